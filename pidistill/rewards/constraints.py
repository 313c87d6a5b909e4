"""Make one reward of several checks of an answer: decoupled (a share for each) or coupled (all or nothing)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pidistill.errors import InputError
from pidistill.rewards.base import Reward, RewardWithParts, judge
from pidistill.types import Example, Message


@dataclass(frozen=True)
class Constraints:
    """Weigh named checks, each a reward in [0, 1], to one reward in [0, 1].

        decoupled:  R = Σ_i w_i·c_i / Σ_i w_i
        coupled:    R = 1 if every c_i = 1 else 0

    Planning tasks are judged coupled: a plan that breaks one rule does not count. An agent that is trained in this way, and
    keeps nine of ten rules, learns nothing from it. arXiv 2602.04942 decouples the constraints of TravelPlanner for training.
    Each check is logged as ``reward/<name>``, unweighted, so that its mean is the share of episodes that pass it.

    Attributes:
        checks: name → reward.
        weights: name → weight, above 0; 1 where absent. Only decoupled has weights.
        coupled: all or nothing.
    """

    checks: Mapping[str, Reward]
    weights: Mapping[str, float] | None = None
    coupled: bool = False

    def __post_init__(self) -> None:
        if not self.checks:
            raise InputError("reward.checks of Constraints is empty; give at least one check")
        unknown = set(self.weights or {}) - set(self.checks)
        if unknown:
            raise InputError(f"reward.weights names {sorted(unknown)[0]!r}, which is none of reward.checks")
        if self.weights and self.coupled:
            raise InputError("reward.weights is not read with reward.coupled=True; remove one of them")
        if not all(0.0 < weight < math.inf for weight in (self.weights or {}).values()):
            raise InputError(f"reward.weights must be above 0, not {dict(self.weights)}; leave a check out to ignore it")

    def __call__(self, example: Example, turns: Sequence[Message]) -> RewardWithParts:
        passed = {name: self._check(name, check, example, turns) for name, check in self.checks.items()}
        if self.coupled:
            return RewardWithParts(float(all(value == 1.0 for value in passed.values())), passed)
        weights = {name: float((self.weights or {}).get(name, 1.0)) for name in passed}
        total = math.fsum(weights[name] * value for name, value in passed.items())
        return RewardWithParts(total / math.fsum(weights.values()), passed)

    def _check(self, name: str, check: Reward, example: Example, turns: Sequence[Message]) -> float:
        value, _ = judge(check, example, turns)
        if isinstance(value, str | bytes) or not 0.0 <= float(value) <= 1.0:  # also where it is NaN
            raise ValueError(f"the check {name!r} gave {value} for {example.id}, which is not in [0, 1]")
        return float(value)
