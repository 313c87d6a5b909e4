"""One method per file; each opens with its equation, its source, and what we do differently."""

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
