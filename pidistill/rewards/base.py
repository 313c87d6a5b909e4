"""Say what a reward is, and hold what rewards have in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, time
from decimal import Decimal
from typing import Any

from pidistill.chat.tool_calls import answer_text
from pidistill.errors import InputError, bounded_repr
from pidistill.types import Example, Message


class RewardWithParts(float):
    """Hold a reward, which is a number, with named numbers that are logged beside it as ``reward/<name>``."""

    parts: Mapping[str, float]

    def __new__(cls, reward: float, parts: Mapping[str, float]) -> "RewardWithParts":
        made = super().__new__(cls, reward)
        made.parts = parts
        return made

    def __getnewargs__(self) -> tuple[float, Mapping[str, float]]:  # type: ignore[override]  # one more than a float's
        return float(self), self.parts

    @property
    def reward(self) -> float:
        """Return the number alone."""
        return float(self)


Reward = Callable[[Example, Sequence[Message]], float]
"""A function of an example and of the turns of its episode that returns a number within the range that its docstring states.

The number may be a :class:`RewardWithParts`. A reward that raises, or returns what is not a finite number, costs its episode,
which is counted; it never counts as 0.

A reward may have a method ``check_reference(example)``, which raises InputError where it cannot judge the example at all. It is
asked about every row before any weights are loaded; see :func:`pidistill.data.load.check_references`. An environment that gives
the reward itself may have the method too; it is built for the check.
"""


def judge(reward: Reward, example: Example, turns: Sequence[Message]) -> tuple[Any, dict[str, Any]]:
    """Return what ``reward`` gives, as it gives it, and its named parts; the collector checks both."""
    judged = reward(example, turns)
    return judged, dict(judged.parts) if isinstance(judged, RewardWithParts) else {}


def last_answer(turns: Sequence[Message]) -> str:
    """Return the text of the last assistant turn without its reasoning, "" where there is none."""
    return next((answer_text(turn) for turn in reversed(turns) if turn["role"] == "assistant"), "")


def reference_text(example: Example) -> str:
    """Return the reference of the example as text; refuse an example without one, with several, or with a time.

    A number is written without an exponent (0.00005, not 5e-05), a date as ``1999-05-04``. A time can be written in several
    ways, and may not be what the source says: of the text "1999-05-04", Hugging Face datasets makes the time 1999-05-04
    00:00:00.
    """
    reference = example.reference
    if reference is None or (isinstance(reference, float) and math.isnan(reference)):  # NaN: the empty cell of a table
        raise InputError(
            f"{example.id} has no reference to compare with; fill the column that dataset.reference_key (of qa_dataset: "
            "answer_key) names, set that key, or leave the row out"
        )
    if isinstance(reference, list | tuple | Mapping):
        raise InputError(
            f"{example.id}: the reference is {bounded_repr(reference)}, and this reward compares with one text or "
            "number; store one, or name a function of your own in environment.reward"
        )
    if isinstance(reference, datetime | time):  # a date without a time is neither
        raise InputError(
            f"{example.id}: the reference is the time {reference.isoformat()}, which the source may write in "
            "another way; store the text that a right answer gives (a local JSON or CSV file is read as it is), or name "
            "another column in dataset.reference_key (of qa_dataset: answer_key)"
        )
    if isinstance(reference, float) and math.isfinite(reference):
        # A table whose column has an empty cell holds whole numbers as 7.0.
        return str(int(reference)) if reference.is_integer() else format(Decimal(repr(float(reference))), "f")
    return str(reference)
