"""`pidistill preview`: what the model will see of a config's rows, how long it is, and what of it is probably not meant.

pidistill preview tiny/opsd
pidistill preview qwen2_5/0.5B_opsd --rows 5 --scan 7473
pidistill preview tiny/pi_distill privileged.control=shuffled --json

Overrides are those of `pidistill run`; configs of every recipe are taken. The prompts are decoded from the ids that a run
builds, special tokens included; what the teacher alone sees is in colour, or between ⟦ and ⟧ where the output is no terminal,
and policy tokens of a row's completion between ⟨ and ⟩. No weights are read. Ends with status 0, or with 2 if the config is
wrong or a run would refuse one of the rows.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from pidistill.commands.common import Parser, exit_on_input_error, parse_with_overrides
from pidistill.commands.plan.lengths import Lengths, RowLengths
from pidistill.commands.plan.reading import KEYS, merged
from pidistill.commands.preview.budget import budget
from pidistill.commands.preview.findings import findings
from pidistill.commands.preview.marks import policy_spans
from pidistill.commands.preview.rows import PreviewRow, Scan, Source, row_of, scan, source_of
from pidistill.commands.preview.show import show_budget, show_findings, show_row, show_scan, statistics_of
from pidistill.errors import InputError
from pidistill.training.start import check_run

SAMPLING_KEYS = frozenset({"view", "samples_per_prompt", "prompts_per_batch", "selection"})
ROUND_NEEDS = ("sampler", "prompts_per_round", "group_size", "max_steps")


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="pidistill preview", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("config", help="a bundled config, or a path")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    made.add_argument("--rows", type=int, default=2, help="rows of the dataset that are printed")
    made.add_argument("--scan", type=int, default=1000, help="rows whose lengths and texts are looked at")
    made.add_argument("--json", action="store_true", help="ids, texts, ranges and all numbers")
    return made


def main(argv: list[str]) -> None:
    with exit_on_input_error():
        preview(parse_with_overrides(parser(), argv))
    sys.exit(0)


def preview(arguments: argparse.Namespace) -> None:
    """Print the preview of a config.

    Raises:
        InputError: the config is wrong; or, when all is printed, a run would refuse one of the rows.
    """
    if arguments.rows < 0 or arguments.scan < 1:
        raise InputError(f"--rows {arguments.rows} must be at least 0 and --scan {arguments.scan} at least 1")
    cfg = read(arguments.config, arguments.overrides)
    source = source_of(cfg)
    if not source.examples:
        raise InputError("the dataset has no rows; check `dataset`")
    seen = scan(source, arguments.scan)
    rows = [row_of(example, source) for example in source.examples[: arguments.rows]]
    own = seen.lengths["its policy tokens"]
    numbers = budget(cfg, _mean_lengths(seen, source), _kept(seen), statistics.fmean(own) if own else None)
    sentences = findings(source, seen)
    if arguments.json:
        print(json.dumps(_as_json(rows, source, seen, numbers, sentences)))
    else:
        _show(rows, source, seen, numbers, sentences)
        if cfg.get("hindsight"):
            print("hindsight: the rollouts of a round bring the privileged information that teaches, not the rows")
    if seen.refused:
        raise InputError(seen.refused)


def read(config: str, overrides: Sequence[str]) -> DictConfig:
    """The config as a run would read it; wrong keys and numbers are refused as there."""
    cfg = merged(config, overrides)
    needs = ("batch_size",) if "batch_size" in cfg else ROUND_NEEDS if cfg.get("objective") else ()
    check_run(cfg, KEYS | SAMPLING_KEYS, ("model", "tokenizer", "dataset", *needs))
    return cfg


def _mean_lengths(seen: Scan, source: Source) -> RowLengths:
    def mean(name: str) -> int:
        return round(statistics.fmean(seen.lengths[name])) if seen.lengths[name] else 0

    shared = [_shared(views.pair.student, views.pair.teacher) for views in seen.views]
    completion = mean("demonstration") if source.demonstration_overflow and not source.room else source.room
    student, teacher = mean("student prompt"), mean("teacher prompt")
    lengths = Lengths(student, teacher, min(round(statistics.fmean(shared)), student, teacher), max(completion, 1))
    return RowLengths(lengths, lengths, f"the first {seen.scanned} rows")


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _kept(seen: Scan) -> int:
    """Rows of the dataset that are not dropped; estimated from the scanned ones where these are not all."""
    kept = seen.scanned - sum(seen.dropped.values())
    return round(seen.total * max(kept, 0) / seen.scanned)


def _show(rows: Sequence[PreviewRow], source: Source, seen: Scan, numbers: dict[str, float], sentences: Sequence[str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    for number, row in enumerate(rows):
        show_row(console, row, source, number)
    console.rule()
    show_scan(console, seen)
    show_budget(console, numbers)
    show_findings(console, sentences)


def _as_json(
    rows: Sequence[PreviewRow], source: Source, seen: Scan, numbers: dict[str, float], sentences: Sequence[str]
) -> dict[str, Any]:
    return {
        "rows": [_row_as_json(row, source) for row in rows],
        "scanned": seen.scanned,
        "total": seen.total,
        "lengths": statistics_of(seen),
        "rows_without_pi": seen.without_privileged,
        "dropped": dict(seen.dropped),
        "budget": numbers,
        "warnings": list(sentences),
        "refused": seen.refused,
        "limits": {
            "max_seq_len": source.max_seq_len,
            "max_new_tokens": source.room,
            "max_privileged_length": source.privileged.max_privileged_length,
        },
    }


def _row_as_json(row: PreviewRow, source: Source) -> dict[str, Any]:
    pair, decode = row.views.pair, source.tokenizer.decode
    given = row.demonstration
    return {
        "id": row.example.id,
        "student": {"ids": pair.student, "text": decode(pair.student)},
        "teacher": {"ids": pair.teacher, "text": decode(pair.teacher), "privileged_spans": row.privileged_spans},
        "privileged_tokens": row.views.privileged_tokens,
        "differ": dataclasses.asdict(row.difference),
        "completion": given
        and {
            "ids": given.completion,
            "policy_mask": given.policy_mask,
            "text": decode(given.completion),
            "policy_spans": policy_spans(given.completion, given.policy_mask, source.tokenizer),
        },
        "no_completion": row.no_demonstration,
        "dropped": row.dropped,
    }
