"""Select hints that the trained model writes itself: 2–3 sentences about a successful trace, as privileged information.

    trace_dataset's tasks ─► hint_prompts ─► recipes/sample_distributed.py with `Hints` ─► traces.jsonl ─► `kind: hints`

The model that is about to be trained sees a successful episode and says what matters in it, without privileged information of
its own (`view: student`). Each row of the file tells where its hint comes from: model folder, task and trace, prompt, seed and
sampling settings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pidistill.errors import InputError
from pidistill.rewards.base import last_answer
from pidistill.rollouts.selections import Rewrite, Selected, Trace
from pidistill.types import Example, Message, Rollout


@dataclass(frozen=True)
class SentenceCount:
    """Return 1.0 where the last assistant turn has between ``low`` and ``high`` sentences, else 0.0.

    A sentence ends with ``.``, ``!`` or ``?`` before white space or the end; abbreviations count as ends, 1.5 does not.
    """

    low: int = 2
    high: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise InputError(f"reward.low={self.low} and reward.high={self.high}: give 1 ≤ low ≤ high sentences")

    def __call__(self, example: Example, turns: Sequence[Message]) -> float:
        ends = re.findall(r"[.!?][\"')\]*]*(?=\s|$)", last_answer(turns))
        return float(self.low <= len(ends) <= self.high)


@dataclass(frozen=True)
class Hints:
    """Keep the first usable hint of every prompt: not cut by the token limit, not empty, with at least ``threshold`` reward.

    A :class:`pidistill.rollouts.selections.Selection`. Its rows name the task and the trace that the hint is about.

    Attributes:
        threshold: of the environment's reward, e.g. :class:`SentenceCount`.
    """

    threshold: float = 1.0

    def select(self, rollouts: Sequence[Rollout], leak_phrases: Sequence[str], rewrite: Rewrite, seed: int) -> Selected:
        traces: dict[int, Trace] = {}
        for rollout in rollouts:
            whole = rollout.task_reward >= self.threshold and rollout.stop_reason == "done"
            usable = whole and last_answer(rollout.turns).strip()
            if usable and rollout.group not in traces:
                told = {"sampled_by": rollout.sampled_by, **hint_provenance(rollout.example)}
                traces[rollout.group] = Trace(rollout.example, rollout.turns, rollout.reward, rollout.group, told)
        return Selected(list(traces.values()))


def hint_provenance(example: Example) -> dict[str, Any]:
    """Return what a hint's row says of the trace behind it."""
    if "trace" not in example.data:
        raise InputError(f"{example.id} is no prompt for a hint; set dataset._component_=pidistill.data.hint_prompts")
    return {"task": example.data["task"], "trace": example.data["trace"].id}
