"""Change objective weights with the optimiser step."""

from collections.abc import Mapping
from dataclasses import dataclass

from pidistill.errors import InputError


@dataclass(frozen=True)
class LinearSchedule:
    """Give ``start`` at step 0, ``end`` from step ``steps`` on, a straight line between."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


def as_schedule(name: str, value: float | Mapping[str, float], *, low: float, high: float) -> LinearSchedule:
    """Read a number, or ``{start, end, steps}`` from a config, as a schedule; every value must lie in [low, high]."""
    if isinstance(value, Mapping):
        if set(value) != {"start", "end", "steps"} or value["steps"] < 1:
            raise InputError(f"objective.{name}={dict(value)} is not a schedule; give a number or {{start, end, steps >= 1}}")
        schedule = LinearSchedule(float(value["start"]), float(value["end"]), int(value["steps"]))
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"objective.{name}={value} is not a number; give one, or {{start, end, steps}}")
    else:
        schedule = LinearSchedule(float(value), float(value), 1)
    for end in (schedule.start, schedule.end):
        if not low <= end <= high:
            raise InputError(f"objective.{name}={end} is outside [{low}, {high}]; set objective.{name} to a value inside it")
    return schedule
