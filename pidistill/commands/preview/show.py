"""Print a preview: private text and policy tokens in colour, or between marks where there is no terminal."""

import math
import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pidistill.commands.preview.budget import in_words
from pidistill.commands.preview.marks import Span, message_changes, policy_spans
from pidistill.commands.preview.rows import PreviewRow, Source
from pidistill.commands.preview.scan import Scan
from pidistill.errors import escape_controls

PRIVILEGED_MARKS, POLICY_MARKS = ("⟦", "⟧"), ("⟨", "⟩")
PRIVILEGED_STYLE, POLICY_STYLE = "black on yellow", "black on green"


def show_row(console: Console, row: PreviewRow, source: Source, number: int) -> None:
    console.rule(Text(escape_controls(f"row {number}: {row.example.id}"), "bold"), align="left")
    decode, pair = source.tokenizer.decode, row.views.pair
    _say(console, _lengths(row, source))
    _say(console, Text("student prompt", "bold"), Text(escape_controls(decode(pair.student))))
    if not pair.has_privileged:
        _say(console, "the row has no privileged information: the teacher sees the student's prompt")
    else:
        _say(console, Text("teacher prompt", "bold"), _teacher(console, row, decode(pair.teacher)), _places(row))
    if row.demonstration is not None:
        spans = policy_spans(row.demonstration.completion, row.demonstration.policy_mask, source.tokenizer)
        text = marked(decode(row.demonstration.completion), spans, POLICY_MARKS, POLICY_STYLE, console.is_terminal)
        own, every = row.demonstration.policy_tokens, len(row.demonstration.completion)
        _say(console, Text(f"the row's completion: {own} policy tokens of {every}", "bold"), text)
    if row.no_demonstration:
        _say(console, f"the row's completion has no ids: {row.no_demonstration}")


def _teacher(console: Console, row: PreviewRow, text: str) -> Text:
    return marked(text, row.privileged_spans or [], PRIVILEGED_MARKS, PRIVILEGED_STYLE, console.is_terminal)


def _places(row: PreviewRow) -> str:
    student, teacher = row.difference.student, row.difference.teacher
    changes = ", ".join(message_changes(row.views.student_messages, row.views.teacher_messages))
    unmarked = "" if row.privileged_spans is not None else "; the template changes the text, so its place is not marked"
    return (
        f"the views differ in the student's ids {student[0]}–{student[1]} ({student[1] - student[0]}) and the teacher's "
        f"{teacher[0]}–{teacher[1]} ({teacher[1] - teacher[0]}): {changes}{unmarked}"
    )


def _lengths(row: PreviewRow, source: Source) -> str:
    student, teacher = len(row.views.pair.student), len(row.views.pair.teacher)
    limit = source.privileged.max_privileged_length
    room = source.max_seq_len - max(student, teacher)
    said = f"student prompt {student} tokens, teacher prompt {teacher}"
    said += f", privileged {row.views.privileged_tokens}" + (f" (at most {limit})" if limit is not None else "")
    said += f"; room for a completion {room} of max_seq_len {source.max_seq_len}"
    said += f", {source.room} asked" if source.room else ""
    return said + (f"; NOT TRAINED ON: {row.dropped}" if row.dropped else "")


def show_scan(console: Console, scan: Scan) -> None:
    title = f"Tokens of {scan.scanned:,} of {scan.total:,} rows"
    table = Table("", "rows", "min", "mean", "p95", "max", title=title, title_justify="left")
    for name, numbers in statistics_of(scan).items():
        table.add_row(name, *[f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" for value in numbers.values()])
    console.print(table)
    dropped = ", ".join(f"{reason} {count}" for reason, count in scan.dropped.items()) or "none"
    _say(console, f"rows without privileged information: {scan.without_privileged}; dropped rows: {dropped}")
    if scan.earlier_turns:
        first = f"{scan.earlier_turns} (first: {scan.earlier_turns_first})"
        _say(console, f"rows whose earlier turns stand in another form than a server shows: {first}")


def statistics_of(scan: Scan) -> dict[str, dict[str, float]]:
    """Return {what is counted: rows, min, mean, p95, max}; p95 is the smallest length that 95 % of the rows do not exceed."""
    return {
        name: {
            "rows": len(lengths),
            "min": min(lengths),
            "mean": statistics.fmean(lengths),
            "p95": sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1],
            "max": max(lengths),
        }
        for name, lengths in scan.lengths.items()
        if lengths
    }


def show_budget(console: Console, numbers: dict[str, float]) -> None:
    table = Table("", "over all ranks", title="Budget, at the rows' mean lengths", title_justify="left")
    table.columns[1].justify = "right"
    for name, value in in_words(numbers):
        table.add_row(name, value)
    console.print(table)


def show_findings(console: Console, sentences: Sequence[str]) -> None:
    for sentence in sentences:
        _say(console, Text("warning: ", "bold red" if console.is_terminal else "") + Text(escape_controls(sentence)))


def marked(text: str, spans: Sequence[Span], marks: tuple[str, str], style: str, colour: bool) -> Text:
    """Return ``text`` with ``spans`` in a style, or between ``marks``; only control characters are written in another way."""
    result, at = Text(), 0
    for start, end in spans:
        inside = escape_controls(text[start:end])
        result.append(escape_controls(text[at:start]))
        result.append(inside if colour else f"{marks[0]}{inside}{marks[1]}", style if colour else None)
        at = end
    return result.append(escape_controls(text[at:]))


def _say(console: Console, *lines: str | Text) -> None:
    """Print the lines as they are: no markup, no wrapping, no numbers in colour."""
    for line in lines:
        console.print(escape_controls(line) if isinstance(line, str) else line, markup=False, highlight=False, soft_wrap=True)
