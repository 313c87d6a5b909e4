"""One question, one answer."""

from dataclasses import dataclass

from pidistill.envs.base import EnvStep
from pidistill.rewards.base import Reward, RewardWithParts
from pidistill.types import Example, Message


@dataclass(frozen=True)
class SingleTurn:
    """The first assistant turn ends the episode, and ``reward`` judges it, cut off or not."""

    reward: Reward

    def reset(self, example: Example) -> Example:
        return example

    def step(self, state: Example, turn: Message, *, truncated: bool) -> EnvStep:
        judged = self.reward(state, [turn])
        if isinstance(judged, RewardWithParts):
            return EnvStep([], judged.reward, done=True, reward_parts=dict(judged.parts))
        return EnvStep([], judged, done=True)
