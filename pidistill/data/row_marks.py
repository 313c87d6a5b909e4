"""Tell rows of the same name and number apart by short digests of what they hold."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any

from pidistill.types import Example, PromptPair


def asked_marks(prompts: Iterable[tuple[Example, PromptPair]]) -> list[str]:
    """Return a digest of what each row asks, which tells two files whose rows have the same names apart.

    It covers the messages and the task of a world (a dataclass in the row's data), and no privileged information. Objects that
    are no plain data count by their type: what Python says of them may differ between two processes.
    """
    return [_digest(_asked(example)) for example, _ in prompts]


def rows_mark(prompts: Iterable[tuple[Example, PromptPair]]) -> str:
    """Return one digest of all rows in their order: what each asks, its privileged information, completion and reference."""
    rows = ([*_asked(row), row.privileged, row.completion, row.reference, row.tools] for row, _ in prompts)
    return _digest([_digest(row) for row in rows])


def _asked(example: Example) -> list[Any]:
    return [example.messages, *filter(is_dataclass, example.data.values())]


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(parts)).encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """Return what JSON writes in the same way in every process."""
    if is_dataclass(value):
        value = {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return sorted([str(key), _plain(part)] for key, part in value.items())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_plain(part)) for part in value)
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
