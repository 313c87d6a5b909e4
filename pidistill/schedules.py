"""Values that change with the optimiser step: objective weights and learning rates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pidistill.errors import InputError


@dataclass(frozen=True)
class LinearSchedule:
    """``start`` at step 0, ``end`` from step ``steps`` on, a straight line between."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


def as_schedule(name: str, value: float | Mapping[str, float], *, low: float, high: float) -> LinearSchedule:
    """A number, or ``{start, end, steps}`` from a config, as a schedule; every value must lie in [low, high]."""
    if isinstance(value, Mapping):
        if set(value) != {"start", "end", "steps"} or value["steps"] < 1:
            raise InputError(f"objective.{name}={dict(value)} is not a schedule; give a number or {{start, end, steps >= 1}}")
        schedule = LinearSchedule(float(value["start"]), float(value["end"]), int(value["steps"]))
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"objective.{name}={value} is no number; give one, or {{start, end, steps}}")
    else:
        schedule = LinearSchedule(float(value), float(value), 1)
    for end in (schedule.start, schedule.end):
        if not low <= end <= high:
            raise InputError(f"objective.{name}={end} is outside [{low}, {high}]; set objective.{name} to a value inside it")
    return schedule


def get_linear_warmup_schedule(optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1) -> LambdaLR:
    """lr · min(1, (step+1)/num_warmup_steps): the first step already moves, unlike torchtune's cosine, which starts at 0."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, num_warmup_steps)), last_epoch)


def get_cosine_schedule_with_warmup_and_floor(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, floor_frac: float = 0.05, last_epoch: int = -1
) -> LambdaLR:
    """Linear warm-up as above, times a half cosine from 1 to ``floor_frac`` over ``num_training_steps``."""

    def factor(step: int) -> float:
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / num_training_steps)))
        return min(1.0, (step + 1) / max(1, num_warmup_steps)) * ((1 - floor_frac) * cosine + floor_frac)

    return LambdaLR(optimizer, factor, last_epoch)
