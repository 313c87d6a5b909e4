"""Train with SDAR: GRPO with a sigmoid-gated token gap beside the reward's advantage (arXiv 2605.15155).

    J = E_{y~S}[ Σ_t clip-min(ρ_t, A + λ·(g_t − ½)) ],  g_t = sg σ(β_g·Δ_t),  Δ_t = log T − log S of the token

What we do differently: the authors add λ·g_t·(log T − log S) to the loss, whose gradient is that of the advantage λ·g_t. A
constant advantage has no expected gradient, so that λ·(g_t − ½) has the same one with less variance, and is 0 where the teacher
agrees; `centred: false` is the published form. Their constant gate (β_g = 0) is noise only, and refused. No reference KL, and
PPO's clip acts on both advantages.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from pidistill.errors import InputError, check_choice
from pidistill.losses.token_gap import gated_advantage, token_gap
from pidistill.objectives.base import Number, distill_weight
from pidistill.objectives.grpo import GRPO, with_teacher
from pidistill.objectives.schedule import as_schedule
from pidistill.types import Batch, Scores, TokenLoss


class SDAR(GRPO):
    """Add λ·(σ(β_g·Δ) − ½) to each token's advantage.

    Args:
        gap_weight: λ, or ``{start, end, steps}``. The authors' scripts use 0.01 where rewards are standardised.
        gate_beta: β_g; more is closer to a sign.
        centred: subtract ½; False is the published form.
        no_pi: rows without privileged information: "rl" (only the reward) or "distill" (another model teaches them too).
        more: the arguments of :class:`GRPO`.
    """

    def __init__(
        self,
        gap_weight: Number = 0.01,
        gate_beta: float = 5.0,
        centred: bool = True,
        no_pi: str = "rl",
        advantage: str = "group_mean",
        **more: Any,
    ) -> None:
        super().__init__(advantage=advantage, **with_teacher("SDAR", more))
        check_choice("objective.no_pi", no_pi, ("rl", "distill"))
        if not gate_beta > 0.0:
            raise InputError(
                f"objective.gate_beta={gate_beta} must be above 0: a constant gate is the log-ratio as a differentiable loss, "
                "whose expected gradient is 0"
            )
        self.gap_weight = as_schedule("gap_weight", gap_weight, low=0.0, high=float("inf"))
        self.gate_beta, self.centred, self.no_pi = gate_beta, centred, no_pi

    def coefficients(self, step: int) -> dict[str, float]:
        return {"gap_weight": self.gap_weight(step)}

    def token_advantages(self, batch: Batch, scores: Scores, step: int) -> Float[Tensor, " N"]:
        return batch.advantages + self.gap_weight(step) * self.gated(batch, scores)

    def gated(self, batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
        """Return the gate of each token, ½ taken off where it is centred; 0 on rows that are not distilled."""
        gated = gated_advantage(token_gap(scores), self.gate_beta, centred=self.centred)
        return distill_weight(self.no_pi, batch) * gated

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        answer = super().token_loss(batch, scores, step)
        return TokenLoss(answer.loss, answer.metrics | {"gap_gate_mean": self.gated(batch, scores)})
