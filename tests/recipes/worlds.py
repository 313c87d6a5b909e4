"""Environments and rewards that test configs name: they reward what an untrained model does, record, fail or wait on demand."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pidistill.envs.base import EnvStep
from pidistill.errors import InputError
from pidistill.types import Example, Message


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
        fail: "raise", "nan" or "refuse" (an InputError on reset) for the example ids in ``fail_on``.
    """

    record: str | None = None
    wait_s: float = 0.0
    fail: str | None = None
    fail_on: Sequence[str] = ()

    def reset(self, example: Example) -> Episode:
        if self.fail == "refuse" and example.id in self.fail_on:
            raise InputError(f"{example.id} is refused by the environment; leave it out")
        return Episode(example)

    def step(self, state: Episode, turn: Message, *, truncated: bool) -> EnvStep:
        time.sleep(self.wait_s)
        state.turns.append(turn["content"])
        if state.example.id in self.fail_on and self.fail == "raise":
            raise ZeroDivisionError("a reward that divides by zero")
        if not truncated and len(state.turns) == 1:
            return EnvStep([{"role": "tool", "content": "obs 5"}], 0.0, done=False)
        words = " ".join(state.turns).split()
        reward = len(set(words)) % 3 / 2
        if state.example.id in self.fail_on and self.fail == "nan":
            reward = float("nan")
        self._write({"example": state.example.id, "turns": state.turns, "reward": reward})
        return EnvStep([], reward, done=True, reward_parts={"words": reward})

    def _write(self, row: dict) -> None:
        if self.record is not None:
            folder = Path(self.record)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


def recorded(folder: str | Path) -> list[str]:
    """The episodes of all ranks, each as a JSON text, in an order that does not depend on who played them."""
    return sorted(line for path in Path(folder).glob("*.jsonl") for line in path.read_text().splitlines())
