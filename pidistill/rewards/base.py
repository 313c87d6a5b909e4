"""What a reward is, and what rewards have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pidistill.chat.messages import message_text
from pidistill.errors import InputError
from pidistill.types import Example, Message


class RewardWithParts(NamedTuple):
    """A reward and what is logged beside it, as ``reward/<name>``."""

    reward: float
    parts: Mapping[str, float]


Reward = Callable[[Example, Sequence[Message]], float | RewardWithParts]
"""(example, the turns of its episode) → a number within the range that its docstring states, with parts or without.

A reward that raises, or gives a number that is not finite, drops the rollout; it never counts as 0.

A reward may have a method ``check_reference(example)``, which raises InputError where it cannot judge the example at all. It is
asked about every row before any weights are loaded; see :func:`pidistill.data.load.check_references`.
"""


def judge(reward: Reward, example: Example, turns: Sequence[Message]) -> RewardWithParts:
    """What ``reward`` gives, with no parts where it names none."""
    judged = reward(example, turns)
    return judged if isinstance(judged, RewardWithParts) else RewardWithParts(judged, {})


def last_answer(turns: Sequence[Message]) -> str:
    """Text of the last assistant turn; "" where there is none."""
    return next((message_text(turn) for turn in reversed(turns) if turn["role"] == "assistant"), "")


def reference_text(example: Example) -> str:
    if example.reference is None:
        raise InputError(f"{example.id} has no reference to compare with; set the dataset's answer_key or reference_key")
    return str(example.reference)
