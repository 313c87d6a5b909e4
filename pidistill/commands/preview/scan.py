"""Render and check every row of a config's datasets as a run would, and count the rows by kind."""

import json
from collections import Counter
from dataclasses import dataclass, field

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from pidistill.commands.preview.rows import Source, judge_row, kind_of, source_of
from pidistill.data.dataset import collect_refused_rows
from pidistill.data.demonstrations import earlier_turns_differ
from pidistill.errors import InputError, escape_controls
from pidistill.types import Example

PARTS = ("dataset", "eval_dataset")

NO_PI = "without privileged information"
NOT_READ = "not read as a row"
NOT_RENDERED = "no prompt"


@dataclass
class Refusals:
    """Count the rows of one kind and keep the first sentence."""

    rows: int
    first: str


@dataclass
class ScanReport:
    """Count the rows of one dataset."""

    rows: int = 0  # all rows
    right: int = 0  # rows that a run takes
    refused: dict[str, Refusals] = field(default_factory=dict)  # those that stop a run, by kind
    # Those that a run leaves out and counts, by reason; a dataset's own reasons count rows of its source.
    dropped: Counter[str] = field(default_factory=Counter)
    without_privileged: int = 0  # those without privileged information, taken or not
    earlier_turns: int = 0  # those whose earlier turns a server shows in another form
    earlier_turns_first: str | None = None  # the first of these

    def refuse(self, kind: str, sentence: str) -> None:
        known = self.refused.setdefault(kind, Refusals(0, sentence))
        known.rows += 1

    @property
    def refused_rows(self) -> int:
        return sum(kind.rows for kind in self.refused.values())


def scan_all(cfg: DictConfig, supervised: bool, as_json: bool) -> None:
    """Print the report of each dataset; then refuse the config where a row is refused or no row is left."""
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
        report.refuse(kind_of(error, NOT_READ), str(error))
    console = Console(stderr=True)
    for example in track(source.examples, f"rows of {part}", console=console, transient=True, disable=not console.is_terminal):
        _count(report, example, source)
    return report


def _count(report: ScanReport, example: Example, source: Source) -> None:
    """Count one row: the first thing that is wrong with it."""
    report.without_privileged += not example.privileged
    if not source.privileged.teaches(example) and source.no_pi == "drop":
        report.dropped["rows_without_pi"] += 1
    elif not source.privileged.teaches(example) and source.no_pi == "error":
        advice = "fill the row, or set no_pi to drop or rl"
        report.refuse(NO_PI, f"{example.id} has no privileged information and no_pi is error; {advice}")
    else:
        try:
            _judge(report, example, source)
        except InputError as error:
            report.refuse(kind_of(error, NOT_RENDERED), str(error))


def _judge(report: ScanReport, example: Example, source: Source) -> None:
    verdict = judge_row(example, source.privileged.build(example, source.tokenizer), source)
    if verdict.refused is not None:
        report.refuse(verdict.reason, verdict.refused)
    elif verdict.left_out:
        report.dropped[verdict.reason] += 1
    elif verdict.demonstration is not None and earlier_turns_differ(verdict.demonstration, source.tokenizer):
        report.earlier_turns += 1
        report.earlier_turns_first = report.earlier_turns_first or example.id
    report.right += verdict.reason is None


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
