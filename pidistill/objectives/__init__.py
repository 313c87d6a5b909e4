"""One method per file; each opens with its equation, its source, and what we do differently."""

from pidistill.objectives.base import Objective
from pidistill.objectives.grpo import GRPO
from pidistill.objectives.opsd import OPSD
from pidistill.objectives.pi_distill import PiDistill

__all__ = ["GRPO", "OPSD", "Objective", "PiDistill"]
