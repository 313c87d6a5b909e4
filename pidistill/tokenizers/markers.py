"""Stand in for text while it is rendered: marks keep a message's control tokens apart, words show where a turn ends."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pidistill.types import Message, Tools

_MARKERS = range(0xF0000, 0xFFFFE)  # private use: no text has a meaning for them


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of the tokens, the longest first: a token wins over one that it contains.

    A token of one character is left out, because it has no inside for a marker.
    """
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def mark(value: Any, control: re.Pattern[str], marker: str) -> Any:
    """Return the value with ``marker`` inside every control token of its texts, keys included."""
    if isinstance(value, str):
        return control.sub(lambda token: token[0][0] + marker + token[0][1:], value)
    if isinstance(value, Mapping):
        return {mark(key, control, marker): mark(item, control, marker) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item, control, marker) for item in value]
    return value


def split_at(text: str, marker: str) -> list[str]:
    """Return the pieces of rendered text between the markers."""
    for written in _written(marker):
        text = text.replace(written, marker)
    return text.split(marker)


def unused_marker(messages: Sequence[Message], tools: Tools) -> str:
    text = json.dumps([list(messages), tools], ensure_ascii=False, default=str)
    return next(m for m in map(chr, _MARKERS) if not any(written in text for written in (m, *_written(m))))


def unused_word(messages: Sequence[Message], tools: Tools) -> str:
    text = json.dumps([list(messages), tools], ensure_ascii=False, default=str)
    return next(word for word in (f"WORD{number}" for number in range(10**6, 10**9)) if word not in text)


def with_sentinel(turn: Message, sentinel: str) -> Message:
    """Return the turn with another content, or other arguments of its last tool call: its end is then easy to find."""
    calls = turn.get("tool_calls")
    if not calls:
        return {**turn, "content": sentinel}
    function = calls[-1].get("function", calls[-1])
    as_text = isinstance(function.get("arguments"), str)
    function = {**function, "arguments": json.dumps({sentinel: sentinel}) if as_text else {sentinel: sentinel}}
    return {**turn, "tool_calls": [*calls[:-1], {**calls[-1], "function": function} if "function" in calls[-1] else function]}


def _written(marker: str) -> tuple[str, str]:
    """Return the marker as a template writes it that asks for ASCII-only JSON, and as one that prints Python's values."""
    return json.dumps(marker)[1:-1], repr(marker)[1:-1]
