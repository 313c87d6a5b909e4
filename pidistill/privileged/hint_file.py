"""Read the file of hints that a model wrote about traces: see :mod:`pidistill.rollouts.hints`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pidistill.chat.tool_calls import visible_text
from pidistill.errors import InputError
from pidistill.jsonl import parse_jsonl

FILE_MADE_BY = "tune run --nproc_per_node 1 recipes/sample_distributed.py --config configs/tau_bench/7B_hints.yaml"


def read_hints(path: str) -> dict[str, str]:
    """Return the first hint of each task in a file that :class:`pidistill.rollouts.hints.Hints` selected."""
    if not Path(path).is_file():
        raise InputError(f"dataset.hints {path} does not exist; it is written by the stage before: run `{FILE_MADE_BY}` first")
    hints: dict[str, str] = {}
    try:
        rows = parse_jsonl(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}); check dataset.hints") from error
    for number, row in rows:
        task, text = _hint_of(row, f"{Path(path).name} line {number}")
        hints.setdefault(task, text)
    return hints


def _hint_of(row: Any, where: str) -> tuple[str, str]:
    provenance = row.get("provenance") if isinstance(row, Mapping) else None
    turns = row.get("completion") if isinstance(row, Mapping) else None
    if not isinstance(provenance, Mapping) or "task" not in provenance or not turns:
        raise InputError(
            f"{where} is not a hint with its task; set dataset.hints to a file of selection pidistill.rollouts.hints.Hints"
        )
    return str(provenance["task"]), visible_text(turns[-1])
