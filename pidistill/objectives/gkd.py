"""Distil with privileged GKD: generalised knowledge distillation (arXiv 2306.13649) from a teacher with PI; no reward.

    J = −E_y[ Σ_t jsd_β(T_t, S_t) ],  y ~ S with probability `lmbda`, else the dataset's own completion
    jsd_β = β·kl(T||M) + (1−β)·kl(S||M),  M = β·T + (1−β)·S;  defined at the ends as β=0: kl(T||S), β=1: kl(S||T)

TRL's trainer has `share_student_as_teacher: true`: that is `teacher: pidistill.teachers.LiveTeacher` here, and another model is
`FrozenTeacher` with `teacher_model` and `teacher_checkpointer`. Its `temperature` divides the logits of both sides: ours is the
sampler's, one for sampling and loss. `max_privileged_length` is a key of `privileged`.

What we do differently: `lmbda` is drawn for each prompt, not for each batch. Near the ends, not at them, the interior's
gradient vanishes: β=.01 has about a hundredth of the gradient of β=0.
"""

from pidistill.errors import check_choice, check_share
from pidistill.losses.token_weights import TokenWeight
from pidistill.objectives.base import Objective, distill_loss, distill_request
from pidistill.types import Batch, Divergence, ScoreRequest, Scores, TokenLoss


class GKD(Objective):
    """Minimise the generalised JSD on a mix of the student's samples and the dataset's completions.

    Args:
        lmbda: share of the prompts that the student answers; the others need a completion in the dataset.
        beta: weight of the teacher in the mixture, in [0, 1].
        token_weight: see :mod:`pidistill.losses.token_weights`.
        no_pi: rows without privileged information: "drop" (counted), "error", "distill" (towards the teacher without it).
    """

    def __init__(
        self, lmbda: float = 1.0, beta: float = 0.5, token_weight: TokenWeight | None = None, no_pi: str = "drop"
    ) -> None:
        check_choice("objective.no_pi", no_pi, ("distill", "drop", "error"))
        check_share("objective.lmbda", lmbda, "the share of prompts that the student answers")
        check_share("objective.beta", beta, "the weight of the teacher in the mixture")
        self.divergence = Divergence("jsd", grad="student", beta=float(beta))
        self.on_policy_frac, self.token_weight, self.no_pi = lmbda, token_weight, no_pi

    def score_request(self, step: int) -> ScoreRequest:
        return distill_request(self.divergence, self.token_weight)

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        return TokenLoss(distill_loss(self.divergence, self.no_pi, self.token_weight, batch, scores), {})
