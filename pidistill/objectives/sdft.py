"""Fine-tune with SDFT: self-distillation from a model that sees a demonstration (arXiv 2601.19897); no reward.

    J = −E_{y~S}[ Σ_{t ≥ skip} kl(T||S)_t ],  T = a moving average of θ, with the demonstration in its prompt

The paper's text calls the divergence reverse, kl(S||T); its author says that kl(T||S) over the full vocabulary is what was
trained, and that is the default here. The first 3 tokens of a completion are left out, and the average takes .01 to .05 of the
new weights per step (`teacher: pidistill.teachers.EMATeacher`).

What we do differently: one mean over the policy tokens of the whole step, skipped ones in its denominator, where the source's
code takes the mean of each sequence's remaining tokens first.
"""

from pidistill.errors import check_choice
from pidistill.losses.token_weights import Chain, SkipFirst, TokenWeight
from pidistill.objectives.base import Objective, distill_loss, distill_request, student_divergence
from pidistill.types import Batch, ScoreRequest, Scores, TokenLoss


class SDFT(Objective):
    """Minimise kl(T||S) on the student's samples, without their first tokens.

    Args:
        skip_first_tokens: policy tokens of each completion that are not trained.
        divergence: "kl_teacher_student", or "kl_student_teacher" as the paper's text has it; or the dotted path of a
            function of one's own.
        token_weight: see :mod:`pidistill.losses.token_weights`; after the skip.
        no_pi: rows without privileged information: "drop" (counted), "error", "distill" (towards the teacher without it).
    """

    def __init__(
        self,
        skip_first_tokens: int = 3,
        divergence: str = "kl_teacher_student",
        token_weight: TokenWeight | None = None,
        no_pi: str = "drop",
    ) -> None:
        check_choice("objective.no_pi", no_pi, ("distill", "drop", "error"))
        self.divergence = student_divergence(divergence, jsd_beta=0.5, choices=("kl_teacher_student", "kl_student_teacher"))
        skip = SkipFirst(skip_first_tokens)
        self.token_weight = skip if token_weight is None else Chain([skip, token_weight])
        self.no_pi = no_pi

    def score_request(self, step: int) -> ScoreRequest:
        return distill_request(self.divergence, self.token_weight)

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        return TokenLoss(distill_loss(self.divergence, self.no_pi, self.token_weight, batch, scores), {})
