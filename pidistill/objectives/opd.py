"""Distil on policy from a separate, stronger model that corrects what the student samples; no reward, no privileged view.

    `divergence: sampled`   J = E_{y~S}[ Σ_t ρ_t·A_t ],  A_t = sg(log T − log S)(y_t),  ρ_t = S(y_t)/sg μ(y_t)
    a divergence            J = −E_{y~S}[ Σ_t D(T_t, S_t) ], over the full vocabulary, or the student's top-k tokens and a tail

The first form is the sampled kl(S||T) of each step as that token's own advantage: its expected gradient is that of
Σ_t kl(S||T)_t with the prefixes held fixed. (As an advantage the *log-ratio* is right; the full-vocabulary KL, a number that
does not depend on the token, has zero expected gradient.) `proximal_alpha` below 1 replaces T there by α·T + (1−α)·S (TOP-D,
arXiv 2607.04751): A_t = sg log(1 − α + α·T/S) is never below log(1−α), so that single tokens which the teacher rules out do not
dominate the step; its expected gradient is that of kl(S || sg(α·T + (1−α)·S)). The source mixes with μ, which is S on a first
update. Published runs use groups of 4 and a LoRA at 1e-4.

`teacher: FrozenTeacher` with `teacher_model` and `teacher_checkpointer`: any model with the student's tokenizer. Every row
distils, privileged information or not; `privileged.control: none` keeps it from the teacher.
"""

import math

from pidistill.errors import InputError, check_choice, check_share
from pidistill.losses.policy_gradient import importance_weighted, ppo_clip_loss
from pidistill.losses.token_gap import proximal_advantage, token_gap
from pidistill.losses.token_weights import TokenWeight, divergences_of, weighted
from pidistill.objectives.base import BOTH_KLS, Objective, distill_loss, distill_request, student_divergence
from pidistill.types import Batch, ScoreRequest, Scores, TokenLoss

CHOICES = ("sampled", "kl_student_teacher", "kl_teacher_student", "jsd")


class OPD(Objective):
    """Distil another model on the student's samples.

    Args:
        divergence: "sampled" (the log-ratio of the sampled token as its advantage), "kl_student_teacher", "kl_teacher_student",
            "jsd", or the dotted path of a function of one's own.
        jsd_beta: weight of the teacher in the mixture of "jsd"; inside (0, 1).
        proximal_alpha: α of the proximal teacher, only with "sampled"; 1 is the teacher itself.
        top_k: the student's K most probable tokens and one tail bucket in place of the full vocabulary.
        token_weight: see :mod:`pidistill.losses.token_weights`.
    """

    no_pi = "distill"

    def __init__(
        self,
        divergence: str = "sampled",
        jsd_beta: float = 0.5,
        top_k: int | None = None,
        proximal_alpha: float = 1.0,
        token_weight: TokenWeight | None = None,
    ) -> None:
        if divergence == "sampled":
            check_choice("objective.top_k", top_k, (None,), because="divergence=sampled looks at the sampled token only")
        elif proximal_alpha != 1.0:
            raise InputError(
                f"objective.proximal_alpha={proximal_alpha} is read only with divergence=sampled; set that, or leave it at 1"
            )
        check_share("objective.proximal_alpha", proximal_alpha, "the teacher's share", "(0, 1]")
        self.proximal_alpha = proximal_alpha
        self.divergence = None if divergence == "sampled" else student_divergence(divergence, jsd_beta, CHOICES, top_k=top_k)
        self.token_weight, self.takes_importance_weights = token_weight, divergence == "sampled"

    def score_request(self, step: int) -> ScoreRequest:
        if self.divergence is not None:
            return distill_request(self.divergence, self.token_weight)
        divergences = BOTH_KLS + divergences_of(self.token_weight)
        return ScoreRequest(student_grad=True, teacher_grad=False, divergences=divergences)

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        if self.divergence is not None:
            return TokenLoss(distill_loss(self.divergence, self.no_pi, self.token_weight, batch, scores), {})
        gap = token_gap(scores)
        advantages = proximal_advantage(gap, self.proximal_alpha)
        loss, ratio, _ = ppo_clip_loss(
            scores.policy_logprobs("student"), batch.ratio_logprobs, advantages, clip_low=0.0, clip_high=math.inf
        )
        loss = importance_weighted(weighted(self.token_weight, loss, batch, scores), batch.importance_weights)
        changed = {} if self.proximal_alpha == 1.0 else {"proximal_change_nats": (advantages - gap).abs()}
        return TokenLoss(loss, {"ratio_mean": ratio} | changed)
