"""The environment protocol: one stateless object serves many episodes, each with its own state."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from pidistill.types import Example, Message


@dataclass
class EnvStep:
    """What an environment answers to one assistant turn.

    Attributes:
        observations: messages forced into the context before the next turn; empty when ``done``.
        reward: added to the episode's reward.
        done: the episode ends here.
        reward_parts: named parts of ``reward``, for the log.
    """

    observations: list[Message]
    reward: float
    done: bool
    reward_parts: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Environment(Protocol):
    def reset(self, example: Example) -> Any:
        """Start an episode on ``example`` and return its state."""

    def step(self, state: Any, turn: Message, *, truncated: bool) -> EnvStep:
        """Answer one assistant turn, changing ``state`` in place.

        ``truncated``: the turn hit the token limit before its end-of-turn token; the episode ends whatever is answered.
        With ``environment_threads`` this is called from several threads, each episode from one at a time.
        """
