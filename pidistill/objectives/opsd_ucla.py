"""Distil on policy in the form of the UCLA authors of OPSD (OPSD-UCLA, arXiv 2601.18734): no reward.

    J = −E_{y~S}[ Σ_t D(T_t, S_t) ],  T = the initial policy with the reference solution, gradient through S only

    first version    D = jsd(β=.5) over the full vocabulary                              (`divergence: jsd`)
    later revision   D = kl(T||S), each vocabulary entry's term clamped at .05           (`divergence: kl_teacher_student`,
                                                                                         `entry_clip: 0.05`)

The paper samples once per prompt (temperature 1.1, top-p .95, top-k 20) and trains a LoRA of rank 64. Use
`teacher: pidistill.teachers.FrozenTeacher`.

What we do differently: the mean is over the policy tokens of the whole step; samples are drawn at temperature 1 in the bundled
config, from the whole vocabulary, so that the sampled and the trained distribution are one.
"""

from pidistill.errors import check_choice
from pidistill.losses.token_weights import TokenWeight
from pidistill.objectives.base import Objective, distill_loss, distill_request, student_divergence
from pidistill.types import Batch, ScoreRequest, Scores, TokenLoss


class OPSDUCLA(Objective):
    """Minimise a full-vocabulary divergence from a frozen teacher with privileged information, on the student's samples.

    Args:
        divergence: "jsd", "kl_teacher_student", "kl_student_teacher", or the dotted path of a function of one's own. Only
            "kl_teacher_student" without ``entry_clip`` teaches a token to which the student gives no probability: the
            gradient of the others on its logit has that probability as a factor, or is clipped away.
        jsd_beta: weight of the teacher in the mixture of "jsd"; inside (0, 1).
        entry_clip: upper bound of each vocabulary entry's term of a KL; the revision uses 0.05.
        token_weight: see :mod:`pidistill.losses.token_weights`.
        no_pi: rows without privileged information: "drop" (counted), "error", "distill" (towards the teacher without it).
    """

    def __init__(
        self,
        divergence: str = "jsd",
        jsd_beta: float = 0.5,
        entry_clip: float | None = None,
        token_weight: TokenWeight | None = None,
        no_pi: str = "drop",
    ) -> None:
        check_choice("objective.no_pi", no_pi, ("distill", "drop", "error"))
        self.divergence = student_divergence(divergence, jsd_beta, entry_clip=entry_clip)
        self.token_weight, self.no_pi = token_weight, no_pi

    def score_request(self, step: int) -> ScoreRequest:
        return distill_request(self.divergence, self.token_weight)

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        return TokenLoss(distill_loss(self.divergence, self.no_pi, self.token_weight, batch, scores), {})
