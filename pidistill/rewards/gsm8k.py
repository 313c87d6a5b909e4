"""Final answers of grade-school mathematics, compared as numbers.

math_verify guards itself against expressions that take forever with SIGALRM, which works in the main thread only and takes the
alarm away from everyone else. Its timeouts are off here. What it gets to see is bounded instead: the final answer alone, at
most :data:`MAX_ANSWER_CHARS` long, without operators or commands whose evaluation can grow (powers, factorials, sums).
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from pidistill.errors import InputError
from pidistill.rewards.base import last_answer, reference_text
from pidistill.types import Example, Message

MAX_ANSWER_CHARS = 64
MAX_NESTING = 3

# The only level at which math_verify says, once, that its timeouts are off; they are off on purpose.
logging.getLogger("math_verify.parser").setLevel(logging.ERROR)
logging.getLogger("math_verify.grader").setLevel(logging.ERROR)

_HARMLESS_COMMANDS = set("frac dfrac tfrac text textbf mathbf mathrm left right times cdot approx".split())  # noqa: SIM905
_SCALES = frozenset(
    (
        *("hundred", "hundreds", "thousand", "thousands", "million", "millions", "billion", "billions", "dozen", "dozens", "k"),
        *("percent", "half", "halves", "third", "thirds", "quarter", "quarters", "tenth", "tenths", "mil", "squared", "cubed"),
        *("times", "plus", "minus", "divided", "over", "or", "and", "not", "to"),
    )
)
_SHORT_UNITS = frozenset("ghlms")
_FORMATS = ("any", "boxed", "hashes")


@dataclass(frozen=True)
class GSM8KReward:
    """1.0 where the final answer of the last assistant turn is the number in ``example.reference``, else 0.0.

    Attributes:
        format: where the final answer stands: "boxed" (the last ``\\boxed{}``), "hashes" (after the last ``####``, to the end
            of its line) or "any" (boxed, else hashes). An answer anywhere else counts as none.
    """

    format: str = "any"

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise InputError(f"the reward's format is {self.format!r}; known are {', '.join(_FORMATS)}")

    def check_reference(self, example: Example) -> None:
        """Refuse an example whose reference is no number: no answer would ever be right."""
        gold = _parse_number(reference_text(example))
        if not any(getattr(reading, "is_number", False) and reading.is_finite for reading in gold):
            raise InputError(
                f"{example.id}: the reference {example.reference!r} is not a number; use another reward, or check the "
                "dataset's answer_key"
            )

    def __call__(self, example: Example, turns: Sequence[Message]) -> float:
        self.check_reference(example)
        gold = _parse_number(reference_text(example))
        answer = final_answer(last_answer(turns), self.format)
        if answer is None:
            return 0.0
        readings = (_parse_number(answer), _parse_number(_number_with_unit(answer) or ""))
        return float(any(verify(list(gold), list(reading), timeout_seconds=None) for reading in readings))


def final_answer(text: str, format: str = "any") -> str | None:
    """What the text gives as its final answer, as it is written there; None where it gives none."""
    boxed = _last_boxed(text) if format != "hashes" else None
    if boxed is not None or format == "boxed":
        return boxed
    _, mark, rest = text.rpartition("####")
    lines = rest.strip().splitlines()
    return lines[0].strip() if mark and lines else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin + 1 : end].strip()
    return None  # cut off before the closing brace


def _number_with_unit(answer: str) -> str | None:
    """Return the number that an answer begins with, where only a unit follows it; None where anything could change its value.

    A unit is one to four words. Words that scale the number ("million", "dozen"), operators and further numbers are no unit.
    Markdown's marks for bold and code around the number or the unit are ignored.
    """
    plain = re.sub(r"\*\*|`", "", answer[: 4 * MAX_ANSWER_CHARS + 1]) if len(answer) <= 4 * MAX_ANSWER_CHARS else ""
    plain = re.sub(r"\^\{?\\circ\}?|(?<=[A-Za-z}])\^\{?[23]\}?(?!\d)", "", plain)  # degrees, square and cubic units
    plain = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", r" \1 ", plain)
    found = re.fullmatch(
        r"\s*((?:-\s?)?[$€£]?\s?-?\d[\d,]*(?:\.\d+)?)(\s*\(?[A-Za-z]+(?:[ -][A-Za-z]+){0,3}\)?)?\s*\.?\s*", plain
    )
    if found is None:
        return None
    words = re.findall(r"[a-z]+", (found[2] or "").lower())
    if any(word in _SCALES or (len(word) == 1 and word not in _SHORT_UNITS) for word in words):
        return None
    return re.sub(r"[$€£\s]", "", found[1]).rstrip(",")


def _nesting(text: str) -> int:
    """The depth of the deepest bracket of any kind."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        deepest = max(deepest, depth)
    return deepest


@lru_cache(maxsize=4096)  # a group answers one question many times
def _parse_number(answer: str) -> tuple[Any, ...]:
    """math_verify's readings of a final answer; none where it is too long or could take long to evaluate."""
    answer = answer.replace("\\$", "").replace("$", "").replace("\\!", "").strip().rstrip(".").strip()
    commands = set(re.findall(r"\\([A-Za-z]+)", answer))
    if not answer or len(answer) > MAX_ANSWER_CHARS or re.search(r"\^|\*\*|!", answer) or commands - _HARMLESS_COMMANDS:
        return ()
    if _nesting(answer) > MAX_NESTING or re.search(r"\d\.?[eE]", answer):  # each level multiplies the time; 1E9999 the digits
        return ()
    return tuple(parse(f"\\boxed{{{answer}}}", parsing_timeout=None))
