"""Every row of a config's datasets, rendered and checked as a run would, and counted by kind."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from pidistill.commands.preview.rows import Source, source_of
from pidistill.data import demonstration
from pidistill.data.dataset import collect_refused_rows
from pidistill.data.demonstrations import TooLong, earlier_turns_differ
from pidistill.data.prompts import row_overflow
from pidistill.errors import InputError, escape_controls
from pidistill.tokenizers.chat_template import TemplateRefusal
from pidistill.tokenizers.rendering import TextLeftOut
from pidistill.types import Example

PARTS = ("dataset", "eval_dataset")

LEFT_OUT = "text left out by the chat template"
REFUSED_BY_TEMPLATE = "refused by the chat template"
TOO_LONG = "too long"
NO_PI = "without privileged information"
NOT_READ = "not read as a row"
NOT_RENDERED = "no prompt"
NOT_LEARNED = "nothing to learn"
NO_REFERENCE = "reference that the reward cannot judge"


@dataclass
class Refusals:
    """Counts the rows of one kind and keeps the first sentence."""

    rows: int
    first: str


@dataclass
class ScanReport:
    """Counts the rows of one dataset.

    Attributes:
        rows: all of them.
        right: those that a run takes.
        refused: those that stop a run, by kind.
        dropped: those that a run leaves out and counts, by reason; a dataset's own reasons count rows of its source.
        without_privileged: those without privileged information, taken or not.
        earlier_turns: those whose earlier turns a server shows in another form.
        earlier_turns_first: the first of these.
    """

    rows: int = 0
    right: int = 0
    refused: dict[str, Refusals] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    without_privileged: int = 0
    earlier_turns: int = 0
    earlier_turns_first: str | None = None

    def refuse(self, kind: str, sentence: str) -> None:
        known = self.refused.setdefault(kind, Refusals(0, sentence))
        known.rows += 1

    @property
    def refused_rows(self) -> int:
        return sum(kind.rows for kind in self.refused.values())


def scan_all(cfg: DictConfig, supervised: bool, as_json: bool) -> None:
    """Print the report of each dataset.

    Raises:
        InputError: when all is printed, a row is refused or no row is left.
    """
    reports = {part: scan_part(cfg, supervised, part) for part in PARTS if cfg.get(part)}
    if as_json:
        print(json.dumps({part: vars(report) for part, report in reports.items()}, default=vars, ensure_ascii=False))
    else:
        console = Console(width=120)
        for part, report in reports.items():
            show_report(console, part, report)
    for part, report in reports.items():
        if report.refused:
            first = next(iter(report.refused.values())).first
            raise InputError(f"{report.refused_rows:,} of {report.rows:,} rows of {part} are refused; the first: {first}")
        if not report.right:
            reasons = ", ".join(f"{reason} {count}" for reason, count in report.dropped.items()) or "it is empty"
            raise InputError(f"no row of {part} is left ({reasons}); check the dataset and its limits")


def scan_part(cfg: DictConfig, supervised: bool, part: str = "dataset") -> ScanReport:
    """Count the rows of one dataset of the config."""
    with collect_refused_rows() as refused:
        source = source_of(cfg, supervised, part)
    report = ScanReport(rows=len(source.examples) + len(refused), dropped=Counter(source.dataset_dropped))
    for error in refused:
        report.refuse(_kind_of(error, NOT_READ), str(error))
    console = Console(stderr=True)
    for example in track(source.examples, f"rows of {part}", console=console, transient=True, disable=not console.is_terminal):
        _count(report, example, source)
    return report


def _count(report: ScanReport, example: Example, source: Source) -> None:
    """Count one row: the first thing that is wrong with it."""
    report.without_privileged += not example.privileged
    if not source.privileged.teaches(example) and source.no_pi == "drop":
        report.dropped["rows_without_pi"] += 1
        return
    try:
        kind = _check(report, example, source)
    except InputError as error:
        report.refuse(_kind_of(error, NOT_RENDERED), str(error))
        return
    report.right += kind is None


def _check(report: ScanReport, example: Example, source: Source) -> str | None:
    """Return the reason for which the row is left out, or the kind of its refusal; None where it is right."""
    if not source.privileged.teaches(example) and source.no_pi == "error":
        report.refuse(NO_PI, f"{example.id} has no privileged information and no_pi is error")
        return NO_PI
    views = source.privileged.build(example, source.tokenizer)
    too_long = row_overflow(example, views, source.privileged, source.room, source.max_seq_len)
    if too_long is not None:
        return _leave_out(report, *too_long, source.on_overflow)
    for check in source.reference_checks:
        if (sentence := _sentence(check, example)) is not None:
            report.refuse(NO_REFERENCE, sentence)
            return NO_REFERENCE
    if source.demonstration_overflow is None:
        return None
    try:
        made = demonstration(example, views.pair, source.tokenizer, max_seq_len=source.max_seq_len)
    except TooLong as error:
        return _leave_out(report, "demonstration_too_long", str(error), source.demonstration_overflow)
    except InputError as error:
        report.refuse(_kind_of(error, NOT_LEARNED), str(error))
        return NOT_LEARNED
    if earlier_turns_differ(made, source.tokenizer):
        report.earlier_turns += 1
        report.earlier_turns_first = report.earlier_turns_first or example.id
    return None


def _leave_out(report: ScanReport, reason: str, sentence: str, on_overflow: str) -> str:
    if on_overflow == "error":
        report.refuse(TOO_LONG, sentence)
    else:
        report.dropped[reason] += 1
    return reason


def _sentence(check: Callable[[Example], None], example: Example) -> str | None:
    try:
        check(example)
    except InputError as error:
        return str(error)
    return None


def _kind_of(error: BaseException, otherwise: str) -> str:
    """Return the kind of a refusal, looking at what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TextLeftOut):
            return LEFT_OUT
        if isinstance(cause, TemplateRefusal):
            return REFUSED_BY_TEMPLATE
        cause = cause.__cause__
    return otherwise


def show_report(console: Console, part: str, report: ScanReport) -> None:
    table = Table("", "rows", "first", title=f"All {report.rows:,} rows of {part}", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("right", f"{report.right:,}", "")
    for kind, refusals in report.refused.items():
        table.add_row(f"REFUSED: {kind}", f"{refusals.rows:,}", Text(escape_controls(refusals.first)))
    for reason, count in report.dropped.items():
        table.add_row(f"left out: {reason}", f"{count:,}", "")
    table.add_row("without privileged information", f"{report.without_privileged:,}", "")
    if report.earlier_turns:
        first = Text(escape_controls(str(report.earlier_turns_first)))
        table.add_row("earlier turns in another form than a server shows", f"{report.earlier_turns:,}", first)
    console.print(table)
