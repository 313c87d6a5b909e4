"""Train with RLSD: the reward gives the sign of each token's advantage, the token gap its size (arXiv 2604.03128, Algorithm 1).

    J = E_{y~S}[ Σ_t clip-min(ρ_t, Â_t) ],  Â_t = A·[(1−λ) + λ·clip(exp(sign(A)·Δ_t), 1−ε, 1+ε)],  Δ_t = log T − log S

In a rollout better than its group the tokens that the teacher finds likelier get more credit; in a worse one those that it
finds less likely get more blame. No gradient flows through the factor, the sign of A never changes, and a group of equal
rewards teaches nothing.

What we do differently: one denominator for the whole step, as everywhere here. Use `teacher: SnapshotTeacher` (theirs is
refreshed every 20 steps) and `privileged` worded as a reference solution.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from pidistill.errors import check_choice, check_share
from pidistill.losses.token_gap import credit_factor, token_gap
from pidistill.objectives.base import Number, distill_weight
from pidistill.objectives.grpo import GRPO, with_teacher
from pidistill.objectives.schedule import as_schedule
from pidistill.types import Batch, Scores, TokenLoss


class RLSD(GRPO):
    """Multiply each token's advantage by a factor from 1 − λ·ε to 1 + λ·ε.

    Args:
        gap_weight: λ, or ``{start, end, steps}``; published: .5 falling to 0 over 50 steps.
        gap_clip: ε; published: .2.
        only: "all" rollouts, or those of "negative" or "positive" advantage.
        no_pi: as in SDAR.
        clip_high: published: 1.28.
        more: the other arguments of :class:`GRPO`.
    """

    def __init__(
        self,
        gap_weight: Number = 0.5,
        gap_clip: float = 0.2,
        only: str = "all",
        no_pi: str = "rl",
        clip_high: float = 1.28,
        advantage: str = "standardised",
        **more: Any,
    ) -> None:
        super().__init__(clip_high=clip_high, advantage=advantage, **with_teacher("RLSD", more))
        check_choice("objective.only", only, ("all", "negative", "positive"))
        check_choice("objective.no_pi", no_pi, ("rl", "distill"))
        check_share("objective.gap_clip", gap_clip, "the factor is clipped to 1 ± gap_clip", "(0, 1)")
        self.gap_weight = as_schedule("gap_weight", gap_weight, low=0.0, high=1.0)
        self.gap_clip, self.only, self.no_pi = gap_clip, only, no_pi

    def coefficients(self, step: int) -> dict[str, float]:
        return {"gap_weight": self.gap_weight(step)}

    def factor(self, batch: Batch, scores: Scores, step: int) -> Float[Tensor, " N"]:
        factor = credit_factor(token_gap(scores), batch.advantages, self.gap_weight(step), self.gap_clip, self.only)
        return factor.masked_fill(distill_weight(self.no_pi, batch) == 0, 1.0)

    def token_advantages(self, batch: Batch, scores: Scores, step: int) -> Float[Tensor, " N"]:
        return batch.advantages * self.factor(batch, scores, step)

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        answer = super().token_loss(batch, scores, step)
        return TokenLoss(answer.loss, answer.metrics | {"credit_factor_mean": self.factor(batch, scores, step)})
