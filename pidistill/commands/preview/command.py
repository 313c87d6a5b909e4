"""`pidistill preview`: show what the model will see of a config's rows, how long it is, and what is probably not meant.

pidistill preview tiny/opsd
pidistill preview qwen2_5/0.5B_opsd --rows 5 --scan 7473
pidistill preview tiny/pi_distill privileged.control=shuffled --json
pidistill preview --scan qwen2_5/0.5B_opsd

`--scan` without a number renders and checks every row of `dataset` and `eval_dataset` and counts them by kind: right, refused
(with the first row of each kind, and of other reasons of that kind), left out, without privileged information, with earlier
turns that a server shows in another form.

Overrides are those of `pidistill run`; configs of every recipe are taken. The prompts are decoded from the ids that a run
builds, special tokens included; what only the teacher sees is in colour, or between ⟦ and ⟧ where the output is no terminal,
and policy tokens of a row's completion between ⟨ and ⟩. No weights are read. Ends with status 0, or with 2 if the config is
wrong or a run would refuse one of the rows that are looked at: the first `--scan` ones of `dataset` and of `eval_dataset`. A
config is code: its components are imported, and those that the prompts need are built (tokenizer, privileged prompt, datasets,
objective, and rewards or environments that check the rows' references); the sampler is not.
"""

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from pidistill.commands.common import config_parser, exit_on_input_error, parse_with_overrides
from pidistill.commands.places import is_supervised, keys_of_recipe, recipe_of
from pidistill.commands.plan.lengths import Lengths, RowLengths
from pidistill.commands.plan.reading import KEYS, merged
from pidistill.commands.preview.budget import budget
from pidistill.commands.preview.findings import findings
from pidistill.commands.preview.marks import policy_spans
from pidistill.commands.preview.rows import PreviewRow, Source, row_of, source_of
from pidistill.commands.preview.scan import EVALUATED, Scan, scan, scan_all
from pidistill.commands.preview.show import show_budget, show_findings, show_row, show_scan, statistics_of
from pidistill.errors import InputError
from pidistill.tokenizers.prefix import common_prefix_length
from pidistill.training.evaluation import chosen_views
from pidistill.training.keys import keys_of
from pidistill.training.start import check_run

ALL_ROWS = "all"


def parser() -> argparse.ArgumentParser:
    made = config_parser("preview", __doc__)
    made.add_argument("--rows", type=int, default=2, help="rows of the dataset that are printed")
    made.add_argument(
        "--scan", type=_rows, default=1000, metavar="N", help="rows that are looked at; without a number: all, by kind"
    )
    made.add_argument("--json", action="store_true", help="ids, texts, ranges and all numbers")
    return made


def _rows(text: str) -> str | int:
    if not re.fullmatch(rf"-?\d+|{ALL_ROWS}", text):
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows; give one, or none for all rows")
    return text if text == ALL_ROWS else int(text)


def main(argv: list[str]) -> None:
    with exit_on_input_error():
        preview(parse_with_overrides(parser(), name_all_rows(argv)))
    sys.exit(0)


def name_all_rows(argv: Sequence[str]) -> list[str]:
    """Return the words with `all` behind a `--scan` that no number follows."""
    words = list(argv)
    for at, word in reversed(list(enumerate(words))):
        if word == "--scan" and not re.fullmatch(r"-?\d+|all", "".join(words[at + 1 : at + 2])):
            words.insert(at + 1, ALL_ROWS)
    return words


def preview(arguments: argparse.Namespace) -> None:
    """Print the preview of a config; then refuse it where a run would refuse one of the rows."""
    every_row = arguments.scan == ALL_ROWS
    count = 1 if every_row else arguments.scan
    if arguments.rows < 0 or count < 1:
        raise InputError(f"--rows {arguments.rows} must be at least 0 and --scan {arguments.scan} at least 1")
    cfg, supervised = read(arguments.config, arguments.overrides)
    if every_row:
        scan_all(cfg, supervised, as_json=arguments.json)
        return
    source = source_of(cfg, supervised)
    if not source.examples:
        raise InputError("the dataset has no rows; check `dataset`")
    seen = scan(source, count)
    stops = seen.stops(source)
    if not seen.views:
        raise InputError(str(stops))
    if stops is None and cfg.get(EVALUATED):
        held_out = source_of(cfg, supervised, EVALUATED)
        sentence = scan(held_out, count).stops(held_out, EVALUATED)
        stops = sentence and f"{EVALUATED}: {sentence}"
    rows = [row_of(example, source) for example in source.examples[: arguments.rows]]
    own = seen.lengths["its policy tokens"]
    policy_tokens = statistics.fmean(own) if own else None
    numbers = budget(cfg, _mean_lengths(seen, source), _kept(seen, source), policy_tokens, supervised=supervised)
    sentences = findings(source, seen)
    if arguments.json:
        print(json.dumps(_as_json(rows, source, seen, numbers, sentences) | {"refused": stops}))
    else:
        _show(rows, source, seen, numbers, sentences)
        if cfg.get("hindsight"):
            print("hindsight: the rollouts of a round bring the privileged information that teaches, not the rows")
    if stops:
        raise InputError(stops)


def read(config: str, overrides: Sequence[str]) -> tuple[DictConfig, bool]:
    """Return the config, and whether its recipe is supervised; refuse wrong keys and numbers as a run would."""
    cfg = merged(config, overrides)
    supervised = is_supervised(config, cfg)
    check_run(cfg, *_keys(config, cfg, supervised))
    chosen_views(cfg)
    return cfg, supervised


def _keys(config: str, cfg: DictConfig, supervised: bool) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the known and the required keys of the bundled recipe that the config's first line names or its keys tell."""
    try:
        recipe = recipe_of(config)
    except InputError:
        recipe = "sft_distributed" if supervised else "opsd_distributed" if cfg.get("objective") else ""
    listed = None if recipe.endswith(".py") else keys_of_recipe(recipe)
    known = KEYS if supervised or cfg.get("objective") else KEYS | keys_of("sample") | keys_of("evaluate")
    return listed or (known, ("model", "tokenizer", "dataset"))


def _mean_lengths(seen: Scan, source: Source) -> RowLengths:
    def mean(name: str) -> int:
        return round(statistics.fmean(seen.lengths[name])) if seen.lengths[name] else 0

    shared = [common_prefix_length(views.pair.student, views.pair.teacher) for views in seen.views]
    completion = mean("demonstration") if source.demonstration_overflow and not source.room else source.room
    student, teacher = mean("student prompt"), mean("teacher prompt")
    lengths = Lengths(student, teacher, min(round(statistics.fmean(shared)), student, teacher), max(completion, 1))
    return RowLengths(lengths, lengths, f"the first {seen.scanned} rows")


def _kept(seen: Scan, source: Source) -> int:
    """Return how many rows of the dataset are not dropped; estimated from the scanned ones where these are not all."""
    dropped = sum(seen.dropped.values()) - sum(source.dataset_dropped.values())  # the builder's own are not among the rows
    return round(seen.total * (seen.scanned - dropped) / seen.scanned)


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
