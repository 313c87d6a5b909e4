"""Distil with PCSD: privileged-context self-distillation, as published for GSM8K on verl; no reward.

    J = −E_{y~S}[ Σ_t kl(sg T||S)_t ],  T = the live θ with the ground-truth answer in its prompt

The source takes the full-vocabulary kl, several samples per prompt at temperature 1, learning rate 1e-6, one epoch per batch,
and calls the divergence reverse; the formula beside the word is kl(T||S), which is what this is.

What we do differently: softmax and kl are taken in fp32, and the mean is over the policy tokens of the whole step.
"""

from pidistill.errors import check_choice
from pidistill.losses.token_weights import TokenWeight
from pidistill.objectives.base import Objective, distill_loss, distill_request, student_divergence
from pidistill.types import Batch, ScoreRequest, Scores, TokenLoss


class PCSD(Objective):
    """Minimise kl(T||S) on the student's samples; the teacher is the trained model itself.

    Args:
        token_weight: see :mod:`pidistill.losses.token_weights`.
        no_pi: rows without privileged information: "drop" (counted), "error", "distill".
    """

    def __init__(self, token_weight: TokenWeight | None = None, no_pi: str = "drop") -> None:
        check_choice("objective.no_pi", no_pi, ("distill", "drop", "error"))
        self.divergence = student_divergence("kl_teacher_student", jsd_beta=0.5)
        self.token_weight, self.no_pi = token_weight, no_pi

    def score_request(self, step: int) -> ScoreRequest:
        return distill_request(self.divergence, self.token_weight)

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        return TokenLoss(distill_loss(self.divergence, self.no_pi, self.token_weight, batch, scores), {})
