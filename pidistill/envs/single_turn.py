"""Play episodes of one question and one answer."""

from dataclasses import dataclass

from pidistill.envs.base import EnvStep
from pidistill.rewards.base import Reward, judge
from pidistill.types import Example, Message


@dataclass(frozen=True)
class SingleTurn:
    """End the episode after the first assistant turn, which ``reward`` judges, also where the token limit cut it off.

    Attributes:
        reward: null for none, where the objective needs none; evaluations then count no successes.
    """

    reward: Reward | None = None

    def reset(self, example: Example) -> Example:
        return example

    def step(self, state: Example, turn: Message, *, truncated: bool) -> EnvStep:
        reward, parts = judge(self.reward, state, [turn]) if self.reward else (None, {})
        return EnvStep([], reward, done=True, reward_parts=parts)
