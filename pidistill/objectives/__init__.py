"""Define one method per file; each opens with its equation, its source, and what we do differently.

Read `base` first, then `pi_distill`. The rollouts of a round enter, and leave with one advantage each. In an update the
scores of a micro-batch enter, and one loss per policy token leaves, not yet averaged.
"""

from pidistill.objectives.base import Objective
from pidistill.objectives.constant_negative import ConstantNegative
from pidistill.objectives.gkd import GKD
from pidistill.objectives.grpo import GRPO
from pidistill.objectives.guide_grpo import GuideGRPO
from pidistill.objectives.opd import OPD
from pidistill.objectives.opd_ppo import OPDPPO
from pidistill.objectives.opsd import OPSD
from pidistill.objectives.opsd_ucla import OPSDUCLA
from pidistill.objectives.pcsd import PCSD
from pidistill.objectives.pi_distill import PiDistill
from pidistill.objectives.rlsd import RLSD
from pidistill.objectives.routed import RoutedObjective
from pidistill.objectives.sdar import SDAR
from pidistill.objectives.sdft import SDFT
from pidistill.objectives.sdpo import SDPO
from pidistill.objectives.semi_opd import SemiOPD

__all__ = [
    "GKD",
    "GRPO",
    "OPD",
    "OPDPPO",
    "OPSD",
    "OPSDUCLA",
    "PCSD",
    "RLSD",
    "SDAR",
    "SDFT",
    "SDPO",
    "ConstantNegative",
    "GuideGRPO",
    "Objective",
    "PiDistill",
    "RoutedObjective",
    "SemiOPD",
]
