"""Render and check rows of a config's datasets as a run would: count them by kind, and measure them."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from pidistill.commands.preview.rows import Source, judge_row, kind_of, source_of
from pidistill.data.dataset import collect_refused_rows
from pidistill.data.demonstrations import earlier_turns_differ
from pidistill.data.prompts import check_no_pi
from pidistill.errors import InputError, escape_controls
from pidistill.privileged.prompt import PromptViews
from pidistill.types import Example, Rollout

EVALUATED = "eval_dataset"
PARTS = ("dataset", EVALUATED)

NO_PI = "without privileged information"
NOT_READ = "not read as a row"
NOT_RENDERED = "no prompt"

COUNTED = ("student prompt", "privileged", "teacher prompt", "demonstration", "its policy tokens")
REPORTED = ("right", "refused", "dropped", "without_privileged", "earlier_turns", "earlier_turns_first")


MOST_SENTENCES = 8


@dataclass
class Refusals:
    """Count the rows of one kind, and keep the first sentence and others that say something else."""

    rows: int
    first: str
    others: list[str] = field(default_factory=list)  # the first of each, at most MOST_SENTENCES

    def add(self, sentence: str) -> None:
        self.rows += 1
        if len(self.others) < MOST_SENTENCES and _form(sentence) not in map(_form, (self.first, *self.others)):
            self.others.append(sentence)


def _form(sentence: str) -> str:
    """Return the sentence without what differs from row to row: numbers, quoted texts and values in brackets."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\[.*?\]|\{.*?\}|\d[\d,.]*", "", sentence)


@dataclass
class Scan:
    """Count what the rows of a dataset are like, and what a run does with them."""

    total: int  # rows of the dataset, of which `scanned` were looked at
    scanned: int = 0
    right: int = 0  # rows that a run takes
    refused: dict[str, Refusals] = field(default_factory=dict)  # those that stop a run, by kind
    # Those that a run leaves out and counts, by reason; a dataset's own reasons count rows of its source.
    dropped: Counter[str] = field(default_factory=Counter)
    without_privileged: int = 0  # those without privileged information, taken or not
    earlier_turns: int = 0  # those whose earlier turns a server shows in another form
    earlier_turns_first: str | None = None  # the first of these
    # Tokens by what is counted, one number per row (of `privileged`: per row that has some).
    lengths: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in COUNTED})
    examples: list[Example] = field(default_factory=list)  # of the first rows alone, those whose prompts can be built
    views: list[PromptViews] = field(default_factory=list)  # their prompts

    def refuse(self, kind: str, sentence: str) -> None:
        self.refused.setdefault(kind, Refusals(0, sentence)).add(sentence)

    @property
    def refused_rows(self) -> int:
        return sum(kind.rows for kind in self.refused.values())

    def stops(self, source: Source, part: str = "dataset") -> str | None:
        """Return the sentence with which a run would stop at its first refused row, or because no row is left."""
        if self.refused:
            return next(iter(self.refused.values())).first
        if self.right:
            return None
        try:
            check_no_pi(source.examples, source.no_pi, source.privileged)
        except InputError as error:
            return str(error)
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items() if count) or "it is empty"
        return f"none of the {self.scanned:,} rows of {part} looked at is left ({reasons}); check the dataset and its limits"


def scan_all(cfg: DictConfig, supervised: bool, as_json: bool) -> None:
    """Print the report of each dataset; then refuse the config where a row is refused or no row is left."""
    scans = {part: _scan_part(cfg, supervised, part) for part in PARTS if cfg.get(part)}
    if as_json:
        found = {
            part: {"rows": one.total} | {name: getattr(one, name) for name in REPORTED} for part, (one, _) in scans.items()
        }
        print(json.dumps(found, default=vars, ensure_ascii=False))
    else:
        console = Console(width=120)
        for part, (one, _) in scans.items():
            show_report(console, part, one)
    for part, (one, source) in scans.items():
        if sentence := one.stops(source, part):
            count = f"{one.refused_rows:,} of {one.total:,} rows of {part} are refused; the first: " if one.refused else ""
            raise InputError(count + sentence)


def _scan_part(cfg: DictConfig, supervised: bool, part: str) -> tuple[Scan, Source]:
    """Look at all rows of one dataset of the config, also those that its builder refuses."""
    with collect_refused_rows() as refused:
        source = source_of(cfg, supervised, part)
    return scan(source, unread=refused), source


def scan(source: Source, count: int | None = None, unread: Sequence[InputError] = ()) -> Scan:
    """Build and check the first ``count`` rows as a run does, and keep their prompts; count all where it is None.

    Args:
        unread: the errors of rows that are not among the source's.
    """
    result = Scan(len(source.examples) + len(unread), len(unread), dropped=Counter(source.dataset_dropped))
    for error in unread:
        result.refuse(kind_of(error, NOT_READ), str(error))
    console, hidden = Console(stderr=True), count is not None
    hidden |= not console.is_terminal
    for example in track(source.examples[:count], "rows", console=console, transient=True, disable=hidden):
        result.scanned += 1
        try:
            _count(result, example, source, keep=count is not None)
        except InputError as error:
            result.refuse(kind_of(error, NOT_RENDERED), str(error))
    return result


def _count(result: Scan, example: Example, source: Source, keep: bool) -> None:
    """Count one row: its lengths, and the first thing that is wrong with it."""
    if not source.privileged.teaches(example):
        result.without_privileged += 1
        if source.no_pi == "drop":
            result.dropped["rows_without_pi"] += 1
            return
        try:
            check_no_pi([example], source.no_pi, source.privileged)
        except InputError as error:
            result.refuse(NO_PI, str(error))
            return
    views = source.privileged.build(example, source.tokenizer)
    verdict = judge_row(example, views, source)
    _count_lengths(result, views, verdict.demonstration)
    if keep:
        result.examples.append(example)
        result.views.append(views)
    if verdict.refused is not None:
        result.refuse(verdict.reason, verdict.refused)
    elif verdict.left_out:
        result.dropped[verdict.reason] += 1
    elif verdict.demonstration is not None and earlier_turns_differ(verdict.demonstration, source.tokenizer):
        result.earlier_turns += 1
        result.earlier_turns_first = result.earlier_turns_first or example.id
    result.right += verdict.reason is None


def _count_lengths(result: Scan, views: PromptViews, learned: Rollout | None) -> None:
    result.lengths["student prompt"].append(len(views.pair.student))
    result.lengths["teacher prompt"].append(len(views.pair.teacher))
    if views.pair.has_privileged:
        result.lengths["privileged"].append(views.privileged_tokens)
    if learned is not None:
        result.lengths["demonstration"].append(len(learned.completion))
        result.lengths["its policy tokens"].append(learned.policy_tokens)


def show_report(console: Console, part: str, report: Scan) -> None:
    table = Table("", "rows", "first", title=f"All {report.total:,} rows of {part}", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("right", f"{report.right:,}", "")
    for kind, refusals in report.refused.items():
        table.add_row(f"REFUSED: {kind}", f"{refusals.rows:,}", Text(escape_controls(refusals.first)))
        for sentence in refusals.others:
            table.add_row("", "", Text(f"also {escape_controls(sentence)}"))
    for reason, count in report.dropped.items():
        table.add_row(f"left out: {reason}", f"{count:,}", "")
    table.add_row("without privileged information", f"{report.without_privileged:,}", "")
    if report.earlier_turns:
        first = Text(escape_controls(str(report.earlier_turns_first)))
        table.add_row("earlier turns in another form than a server shows", f"{report.earlier_turns:,}", first)
    console.print(table)
