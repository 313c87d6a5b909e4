"""Define one method per file; each opens with its equation, its source, and what we do differently.

Read `base` first, then `pi_distill`. The rollouts of a round enter, and leave with one advantage each. In an update the
scores of a micro-batch enter, and one loss per policy token leaves, not yet averaged.
"""

from pidistill.objectives.base import Objective
from pidistill.objectives.gkd import GKD
from pidistill.objectives.grpo import GRPO
from pidistill.objectives.guide_grpo import GuideGRPO
from pidistill.objectives.opd import OPD
from pidistill.objectives.opd_ppo import OPDPPO
from pidistill.objectives.opsd import OPSD
from pidistill.objectives.opsd_ucla import OPSDUCLA
from pidistill.objectives.pcsd import PCSD
from pidistill.objectives.pi_distill import PiDistill
from pidistill.objectives.sdft import SDFT
from pidistill.objectives.sdpo import SDPO

__all__ = ["GKD", "GRPO", "OPD", "OPDPPO", "OPSD", "OPSDUCLA", "PCSD", "SDFT", "SDPO", "GuideGRPO", "Objective", "PiDistill"]
