"""Shape rewards: add parts to an episode's reward once it has ended, each under its own name.

    R' = R + Σ_parts part,   part = Σ over the assistant turns of a number per turn

Listed under the key `reward_shaping`; each part is logged as ``reward/<name>``. Advantages are taken from R'. What counts as a
success is judged only on R (``Rollout.task_reward``), so that a penalty never turns a success into a failure.

| part | arXiv 2602.04942 | here |
| --- | --- | --- |
| LengthPenalty | where R > 0: 0 to −0.2 per turn, mean over turns, at least −0.3 | the same; the last slope's end is ours |
| OverlongPenalty | – (verl's DAPO recipe) | 0 to −factor over the last tokens before the limit |
| LeakPenalty | −0.1 for each leak phrase in an assistant message | the same, a phrase counted as often as it is said |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from pidistill.chat.phrases import count_phrases, turn_text
from pidistill.config import build
from pidistill.errors import InputError
from pidistill.types import Rollout


@runtime_checkable
class Shaping(Protocol):
    """Compute a part of the reward, which is logged under ``name``."""

    name: str

    def __call__(self, rollout: Rollout) -> list[float]:
        """Return one number per assistant turn of a whole episode, truncated turns included, to add to its reward."""


def build_shaping(node: Any) -> tuple[Shaping, ...]:
    """Return the parts of the config key `reward_shaping`, a list of components; none where it is null."""
    parts = build(node) or []
    if not isinstance(parts, list):
        raise InputError("reward_shaping is one component, not a list of them; begin it with a dash (`- _component_: ...`)")
    for i, part in enumerate(parts):
        if not isinstance(part, Shaping):
            raise InputError(f"reward_shaping[{i}] is {part!r:.80}, not a part such as pidistill.rewards.LengthPenalty")
        if part.name in (other.name for other in parts[:i]):
            raise InputError(f"two parts of reward_shaping are called {part.name!r}; remove one, or give it another name")
    return tuple(parts)


def add_shaping(rollout: Rollout, parts: Sequence[Shaping]) -> None:
    """Add every part to the rollout's reward, turn rewards and reward parts, in place; ``task_reward`` stays."""
    for part in parts:
        if part.name in rollout.reward_parts:
            raise InputError(f"two parts of the reward are called {part.name!r}; give one of `reward_shaping` another name")
        values = [float(value) for value in part(rollout)]
        rollout.turn_rewards = [a + b for a, b in zip(rollout.turn_rewards, values, strict=True)]
        rollout.reward_parts = {**rollout.reward_parts, part.name: math.fsum(values)}
        rollout.reward += math.fsum(values)


@dataclass(frozen=True)
class LengthPenalty:
    """Lower the reward of episodes that earned something for their long turns.

        f(n) = 0                                     n ≤ free_tokens
               −first · (1 − cos(π·x)) / 2           x = (n − free_tokens) / (knee_tokens − free_tokens) in (0, 1]
               −first − (last − first) · x           x = (n − knee_tokens) / (end_tokens − knee_tokens) in (0, 1]
               −last                                 beyond
        part = max(floor, mean of f over the assistant turns)   where R > 0, else 0

    Attributes:
        free_tokens, knee_tokens, end_tokens: policy tokens of a turn. The paper does not say where its second slope ends;
            ``end_tokens`` makes it as wide as the first.
        first, last: the penalty at ``knee_tokens`` and from ``end_tokens`` on.
        floor: the least that the mean may be; with the paper's numbers it is never reached.
    """

    free_tokens: int = 2000
    knee_tokens: int = 5000
    end_tokens: int = 8000
    first: float = 0.1
    last: float = 0.2
    floor: float = -0.3
    name: ClassVar[str] = "length"

    def __post_init__(self) -> None:
        if not 0 <= self.free_tokens < self.knee_tokens < self.end_tokens:
            raise InputError(
                f"reward_shaping: free_tokens {self.free_tokens}, knee_tokens {self.knee_tokens} and end_tokens "
                f"{self.end_tokens} of LengthPenalty must rise"
            )
        if not 0.0 <= self.first <= self.last < math.inf or not self.floor <= 0.0:
            raise InputError(
                f"reward_shaping: first {self.first}, last {self.last} and floor {self.floor} of LengthPenalty must satisfy "
                "0 <= first <= last and floor <= 0; the first two are subtracted"
            )

    def __call__(self, rollout: Rollout) -> list[float]:
        lengths = rollout.turn_policy_tokens
        if not lengths or not rollout.task_reward > 0:
            return [0.0] * len(lengths)
        each = [self.of_turn(n) / len(lengths) for n in lengths]
        total = math.fsum(each)
        return [value * self.floor / total for value in each] if total < self.floor else each

    def of_turn(self, n: int) -> float:
        """Return f(n)."""
        if n <= self.free_tokens:
            return 0.0
        if n <= self.knee_tokens:
            x = (n - self.free_tokens) / (self.knee_tokens - self.free_tokens)
            return -self.first * (1.0 - math.cos(math.pi * x)) / 2.0
        x = min(1.0, (n - self.knee_tokens) / (self.end_tokens - self.knee_tokens))
        return -self.first - (self.last - self.first) * x


@dataclass(frozen=True)
class OverlongPenalty:
    """Lower the reward linearly over the last tokens before a limit: −factor · (tokens − (limit − buffer)) / buffer.

    It is 0 up to limit − buffer and −factor from the limit on, and is added to the reward of the last turn.

    Attributes:
        limit: tokens of the whole completion as the view that sampled read it, observations included, usually
            `sampler.max_new_tokens`, which counts the same.
        buffer: tokens before the limit over which the reward falls.
        factor: the most that is subtracted.
    """

    limit: int
    buffer: int
    factor: float = 1.0
    name: ClassVar[str] = "overlong"

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.limit or not 0.0 < self.factor < math.inf:
            raise InputError(
                f"reward_shaping: OverlongPenalty needs 0 < buffer <= limit and a factor above 0, not buffer {self.buffer}, "
                f"limit {self.limit}, factor {self.factor}"
            )

    def __call__(self, rollout: Rollout) -> list[float]:
        reads = rollout.teacher_reads if rollout.sampled_by == "teacher" else ()
        longer = sum(len(shown) - (last - first) for first, last, shown in reads)  # the sampler counted these ids too
        over = len(rollout.completion) + longer - (self.limit - self.buffer)
        share = min(max(over / self.buffer, 0.0), 1.0)
        return [0.0] * (len(rollout.turn_policy_tokens) - 1) + [-self.factor * share if share else 0.0]


@dataclass(frozen=True)
class LeakPenalty:
    """Subtract ``penalty`` for every leak phrase that an assistant turn says, tool calls and truncated turns included.

    Attributes:
        phrases: usually ``${privileged.leak_phrases}``, so that what is counted is what is punished.
        penalty: subtracted per phrase said; 0 only counts.
    """

    phrases: Sequence[str]
    penalty: float = 0.1
    name: ClassVar[str] = "leak"

    def __post_init__(self) -> None:
        if isinstance(self.phrases, str) or not self.phrases or not all(self.phrases):
            raise InputError(f"reward_shaping: phrases of LeakPenalty is {self.phrases!r}; give a list of phrases, none empty")
        if not 0.0 <= self.penalty < math.inf:
            raise InputError(f"reward_shaping: penalty of LeakPenalty is {self.penalty}; it is subtracted: give at least 0")

    def __call__(self, rollout: Rollout) -> list[float]:
        turns = [turn for turn in rollout.turns if turn["role"] == "assistant"]
        return [0.0 - self.penalty * count_phrases(turn_text(turn), self.phrases) for turn in turns]
