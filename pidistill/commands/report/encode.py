"""Make training rollouts small enough for a page: texts once, tokens as numbers, values as 16-bit thousandths of a nat.

A page of 2,000 rollouts of 500 tokens holds a million tokens with up to eight numbers each. As JSON numbers they would take
80 MB; as base64 of 16-bit integers they take a third. They stand in one long text outside the JSON, which the browser does not
parse, and only the rollout that is looked at is decoded: its tokens (16 or 32 bits each), then its columns one by one.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from pidistill.errors import escape_controls

SCALE = 1000  # steps per nat
MISSING = -32768
TRUNCATED = ("length", "turn_length")


class Texts:
    """Number texts in the order in which they come; the same text has the same number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers))

    def listed(self) -> list[str]:
        """Return the texts by number, with control characters, marks of direction and half characters written out."""
        return [escape_controls(text) for text in self._numbers]


def encode_rollouts(rows: Sequence[tuple[int, dict[str, Any]]]) -> tuple[dict[str, Any], str]:
    """Return ({"texts", "tokens", "bits", "rows"}, the long text) of (number of the run, row of training_rollouts.jsonl)."""
    texts, tokens = Texts(), Texts()
    numbers = [[tokens.number(str(token)) for token in row["tokens"]] for _, row in rows]
    ids = np.uint16 if len(tokens.listed()) <= 2**16 else np.uint32
    encoded, blob, start = [], [], 0
    for (run, row), own in zip(rows, numbers, strict=True):
        values = _columns(row)
        data = base64.b64encode(
            b"".join([_bytes(own, ids), *(_bytes(_thousandths(v), np.int16) for v in values.values())])
        ).decode()
        place = {"at": start, "chars": len(data), "count": len(own), "names": list(values), "logged": _length(values)}
        encoded.append(_outline(run, row, values, texts) | place)
        blob.append(data)
        start += len(data)
    return {"texts": texts.listed(), "tokens": tokens.listed(), "bits": 8 * ids().nbytes, "rows": encoded}, "".join(blob)


def _columns(row: dict[str, Any]) -> dict[str, list[float | None]]:
    """Return the columns of equal length that the page shows: without those that say nothing of their own."""
    values = {name: column for name, column in (row.get("values") or {}).items() if isinstance(column, list) and column}
    values = {name: column for name, column in values.items() if len(column) == _length(values)}
    trained = values.get(f"{row.get('sampled_by')}_logprobs")
    if trained is not None and "sampled_logprobs" in values and _same(trained, values["sampled_logprobs"]):
        del values["sampled_logprobs"]
    if len(set(values.get("advantage", ()))) == 1:
        del values["advantage"]
    return values


def _length(values: dict[str, list[float | None]]) -> int:
    return len(next(iter(values.values()), ()))


def _same(ours: list[float | None], theirs: list[float | None]) -> bool:
    """Return whether two columns are equal up to what the page can show."""
    return all(
        a == b or (a is not None and b is not None and abs(a - b) <= 1 / SCALE) for a, b in zip(ours, theirs, strict=True)
    )


def _outline(run: int, row: dict[str, Any], values: dict[str, list[float | None]], texts: Texts) -> dict[str, Any]:
    """Return everything of a row but its tokens and columns."""
    names = ("step", "round", "group", "sampled_by", "stop_reason", "reward", "task_reward", "reward_parts", "success", "leak")
    advantage = (row.get("values") or {}).get("advantage") or []
    return {
        "run": run,
        **{name: _escaped(row[name]) for name in names if row.get(name) is not None},
        "example": escape_controls(str(row.get("example", ""))),
        "turns": _escaped(row.get("turns") or []),
        "turn_rewards": row.get("turn_rewards") or [],
        "sampled": "sampled_logprobs" in (row.get("values") or {}),
        "cut": row.get("stop_reason") in TRUNCATED,
        "policy_tokens": row.get("policy_tokens"),
        "student": texts.number(str(row.get("student_prompt", ""))),
        "teacher": texts.number(str(row.get("teacher_prompt", ""))),
        "pi": None if row.get("privileged") is None else texts.number(str(row["privileged"])),
        "reads": [[read["at"], texts.number(str(read["text"]))] for read in row.get("teacher_reads") or []],
        "runs": _run_lengths(row.get("policy") or []),
        "advantage": advantage[0] if len(set(advantage)) == 1 else None,
        "log_ratio": _mean_difference(values.get("teacher_logprobs"), values.get("student_logprobs")),
        "kl": _mean(values.get("kl_teacher_student") or values.get("kl_student_teacher")),
    }


def _escaped(node: Any) -> Any:
    """Return lists and mappings with every text in them escaped."""
    if isinstance(node, dict):
        return {str(key): _escaped(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escaped(value) for value in node]
    return escape_controls(node) if isinstance(node, str) else node


def _thousandths(column: Sequence[float | None]) -> np.ndarray:
    numbers = np.asarray([np.nan if value is None else value for value in column], dtype=np.float64)
    rounded = np.clip(np.round(numbers * SCALE), MISSING + 1, -MISSING - 1)
    return np.where(np.isnan(rounded), MISSING, rounded)


def _bytes(values: Sequence[int] | np.ndarray, dtype: type) -> bytes:
    """Return little-endian integers."""
    return np.asarray(values).astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def _run_lengths(mask: Sequence[int]) -> list[int]:
    """Return lengths of the stretches of a mask, beginning with one of policy tokens: it may be 0."""
    lengths, own = [0], 1
    for value in mask:
        if bool(value) != bool(own):
            lengths.append(0)
            own = not own
        lengths[-1] += 1
    return lengths


def _mean(column: Sequence[float | None] | None) -> float | None:
    known = [value for value in column or [] if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def _mean_difference(ours: Sequence[float | None] | None, theirs: Sequence[float | None] | None) -> float | None:
    pairs = zip(ours or [], theirs or [], strict=False)
    return _mean([a - b for a, b in pairs if a is not None and b is not None])
