"""Any environment, with a price on saying what gives the privileged information away (arXiv 2602.04942).

    r_turn = environment's reward − penalty · (number of times that the turn says one of ``phrases``)

The paper takes 0.1 off for each leak phrase in an assistant message; so do we, counting a phrase as often as it is said.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pidistill.envs.base import Environment, EnvStep
from pidistill.errors import InputError
from pidistill.messages import messages_text
from pidistill.types import Example, Message


def count_phrases(text: str, phrases: Sequence[str]) -> int:
    """How often ``text`` says any of the phrases as whole words, whatever the case; a phrase inside another counts too."""
    return sum(len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE)) for phrase in phrases)


@dataclass(frozen=True)
class LeakPenalty:
    """``environment`` less ``penalty`` for every leak phrase that an assistant turn says, truncated turns included.

    The part is logged as ``reward/leak``. A success is told by the whole reward, so a success that leaks is none as long as
    `eval_success_threshold` is the full reward: set it to what a success is still worth with the penalty, e.g. 0.5, and so
    `hindsight.success_threshold` and `selection.threshold`.

    Attributes:
        phrases: usually ``${privileged.leak_phrases}``, so that what is counted is what is punished.
        penalty: subtracted per phrase said; 0 only counts.
    """

    environment: Environment
    phrases: Sequence[str]
    penalty: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.phrases, str) or not self.phrases or not all(self.phrases):
            raise InputError(f"environment.phrases is {self.phrases!r}; give a list of phrases, none of them empty")
        if not 0.0 <= self.penalty < float("inf"):
            raise InputError(f"environment.penalty is {self.penalty}; it is subtracted, so give a number of at least 0")

    def reset(self, example: Example) -> Any:
        return self.environment.reset(example)

    def step(self, state: Any, turn: Message, *, truncated: bool) -> EnvStep:
        step = self.environment.step(state, turn, truncated=truncated)
        leak = 0.0 - self.penalty * count_phrases(messages_text([turn]), self.phrases)
        return replace(step, reward=step.reward + leak, reward_parts={**step.reward_parts, "leak": leak})
