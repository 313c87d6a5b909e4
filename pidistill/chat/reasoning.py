"""Find where the reasoning at the beginning of an assistant turn ends: one rule for calls, answers and rewards.

Reasoning begins with ``<think>``, or with the turn itself where the prompt opened it, and ends with ``</think>``. Elsewhere
these tags are words of an answer, or of an argument of a call.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

THINK, END_THINK = "<think>", "</think>"
CALL_TAGS = ("action", "tool_call")


def begins_with_think(text: str) -> bool:
    """Return whether the turn opens its reasoning itself."""
    return text.lstrip().startswith(THINK)


def reasoning_end(text: str, call_tags: Sequence[str] = CALL_TAGS) -> int:
    """Return where the reasoning ends, behind its closing tag: 0 where there is none, the text's length where it is not closed.

    Reasoning that the prompt opened has the closing tag alone. Inside a call, between ``call_tags``, that tag ends nothing.
    """
    if begins_with_think(text):
        end = text.find(END_THINK)
        return len(text) if end < 0 else end + len(END_THINK)
    found = _calls_and_ends(tuple(call_tags)).finditer(text)
    return next((match.end() for match in found if match[0] == END_THINK), 0)


def shows_its_reasoning(text: str) -> bool:
    """Return whether the text alone shows where its reasoning ends, for a turn whose reasoning the prompt opened.

    It does not where the turn never closes the reasoning, or where the reasoning speaks of the opening tag or of a call around
    the closing one.
    """
    reasoning, closed, _ = text.partition(END_THINK)
    if begins_with_think(text):
        return True
    return bool(closed) and THINK not in reasoning and reasoning_end(text) == len(reasoning + closed)


@lru_cache
def _calls_and_ends(tags: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of whole calls, in whose arguments a tag is text, and of closing tags outside of them."""
    names = "|".join(map(re.escape, tags)) or r"(?!)"
    return re.compile(rf"<({names})>\s*(?:\{{|<function=)(?:(?!<\1>).)*?</\1>|{END_THINK}", re.DOTALL)
