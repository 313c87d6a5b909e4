"""One question, one answer."""

from dataclasses import dataclass

from pidistill.envs.base import EnvStep
from pidistill.rewards.base import Reward, judge
from pidistill.types import Example, Message


@dataclass(frozen=True)
class SingleTurn:
    """The first assistant turn ends the episode, and ``reward`` judges it, cut off or not."""

    reward: Reward

    def reset(self, example: Example) -> Example:
        return example

    def step(self, state: Example, turn: Message, *, truncated: bool) -> EnvStep:
        judged = judge(self.reward, state, [turn])
        return EnvStep([], judged.reward, done=True, reward_parts=dict(judged.parts))
