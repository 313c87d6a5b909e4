"""Define what test configs name: an environment that rewards an untrained model, and parts that fail on demand."""

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pidistill.envs.base import EnvStep
from pidistill.errors import InputError
from pidistill.objectives import GRPO
from pidistill.types import Batch, Example, Message, Scores, TokenLoss


@dataclass
class Episode:
    example: Example
    turns: list[str] = field(default_factory=list)


@dataclass
class VariedEnvironment:
    """Two turns with an observation between them; the reward depends on the words said, so that groups have spread.

    Attributes:
        record: a folder; every rank appends (example, turns, reward) of its episodes to a file of its own there.
        wait_s: seconds that every step takes.
        noise: how much of the reward is drawn from numpy's global random stream.
        fail: "raise", "nan", "hang" or "refuse" (an InputError on reset), for the example ids in ``fail_on`` and, but for the
            last, the n-th episode that ends here, n in ``fail_episodes``.
    """

    record: str | None = None
    wait_s: float = 0.0
    noise: float = 0.0
    fail: str | None = None
    fail_on: Sequence[str] = ()
    fail_episodes: Sequence[int] = ()
    ended: int = 0

    def reset(self, example: Example) -> Episode:
        if self.fail == "refuse" and example.id in self.fail_on:
            raise InputError(f"{example.id} is refused by the environment; leave it out")
        return Episode(example)

    def step(self, state: Episode, turn: Message, *, truncated: bool) -> EnvStep:
        time.sleep(self.wait_s)
        state.turns.append(turn["content"])
        if state.example.id in self.fail_on:
            return self._failure()
        if not truncated and len(state.turns) == 1:
            return EnvStep([{"role": "tool", "content": "obs 5"}], 0.0, done=False)
        words = " ".join(state.turns).split()
        reward = len(set(words)) % 3 / 2
        if self.noise:
            reward += self.noise * np.random.rand()
        self.ended += 1
        if self.ended - 1 in self.fail_episodes:
            return self._failure()
        self._write({"example": state.example.id, "turns": state.turns, "reward": reward})
        return EnvStep([], reward, done=True, reward_parts={"words": reward})

    def _failure(self) -> EnvStep:
        if self.fail == "hang":
            threading.Event().wait()
        return EnvStep([], 1 / 0 if self.fail == "raise" else float("nan"), done=True)

    def _write(self, row: dict) -> None:
        if self.record is not None:
            folder = Path(self.record)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


class PoisonedGRPO(GRPO):
    """GRPO whose loss is NaN at the given steps (counted from 0)."""

    def __init__(self, steps: Sequence[int], **settings: Any) -> None:
        super().__init__(**settings)
        self.steps = steps

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        result = super().token_loss(batch, scores, step)
        return TokenLoss(result.loss * float("nan"), result.metrics) if step in self.steps else result


class FeedbackOfRank:
    """A judge that tells two neighbouring ranks two things, of different lengths."""

    def __call__(self, example: Example, turns: Sequence[Message]) -> str:
        return "d1 c7" if int(os.environ.get("RANK", "0")) % 2 else "d1"


def recorded(folder: str | Path) -> list[str]:
    """The episodes of all ranks, each as a JSON text, in an order that does not depend on who played them."""
    return sorted(line for path in Path(folder).glob("*.jsonl") for line in path.read_text().splitlines())


def second_observation(state: Episode) -> str:
    """Say what a teacher may know after the first turn, in words of the tiny world."""
    return "obs 7 obs 5"
