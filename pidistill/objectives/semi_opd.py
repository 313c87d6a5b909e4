"""Semi-OPD: on-policy distillation on rollouts of the initial student that were sampled once (arXiv 2610.11291).

    D₀ = {y ~ S₀}, fixed.
    `form: k2`            J = −½·Σ_t (log S − sg log T)²(y_t): what the source minimises, −Δ_t·log S(y_t) with Δ of the current
                          S, has exactly its gradient
    `form: importance`    J = Σ_t ρ_t·sg(log T − log S)(y_t),  ρ_t = S(y_t)/S₀(y_t) of the recorded log-probs: the kl(S||T) of
                          each step, importance-weighted
    a divergence          J = −Σ_t D(T_t, S_t) over the full vocabulary at these prefixes, exact for them

The first one's minimum is S = T on the sampled tokens; it is not a gradient of kl(S||T) once S has left S₀. Rows come from
`sample_distributed` with `view: student` and `pidistill.rollouts.selections.All`. Nothing is sampled in training; a teacher
that never changes may keep what it read (`teacher.cache_gib`).
"""

import math

from pidistill.errors import InputError, check_choice
from pidistill.losses.estimators import k2
from pidistill.losses.policy_gradient import ppo_clip_loss
from pidistill.losses.token_gap import token_gap
from pidistill.losses.token_weights import TokenWeight, divergences_of, weighted
from pidistill.objectives.base import (
    BOTH_KLS,
    Objective,
    distill_loss,
    distill_request,
    distill_weight,
    student_divergence,
)
from pidistill.types import Batch, ScoreRequest, Scores, TokenLoss

FORMS = ("k2", "importance", "kl_student_teacher", "kl_teacher_student", "jsd")


class SemiOPD(Objective):
    """Distil on the dataset's own completions, which the initial student sampled; `group_size: 1`.

    Args:
        form: "k2", "importance", or the divergence "kl_student_teacher", "kl_teacher_student" or "jsd".
        jsd_beta: weight of the teacher in the mixture of "jsd"; inside (0, 1).
        token_weight: see :mod:`pidistill.losses.token_weights`.
        no_pi: rows without privileged information: "distill" (the teacher may be another model), "drop" or "error".
    """

    on_policy_frac = 0.0

    def __init__(
        self, form: str = "k2", jsd_beta: float = 0.5, token_weight: TokenWeight | None = None, no_pi: str = "distill"
    ) -> None:
        check_choice("objective.form", form, FORMS)
        check_choice("objective.no_pi", no_pi, ("distill", "drop", "error"))
        self.form, self.token_weight, self.no_pi = form, token_weight, no_pi
        self.divergence = None if form in ("k2", "importance") else student_divergence(form, jsd_beta)

    def score_request(self, step: int) -> ScoreRequest:
        if self.divergence is not None:
            return distill_request(self.divergence, self.token_weight)
        return ScoreRequest(student_grad=True, teacher_grad=False, divergences=BOTH_KLS + divergences_of(self.token_weight))

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        if self.divergence is not None:
            return TokenLoss(distill_loss(self.divergence, self.no_pi, self.token_weight, batch, scores), {})
        if self.form == "k2":
            term, metrics = k2(scores.student_logprobs, scores.teacher_logprobs.detach()), {}
        else:
            if batch.ratio_logprobs is None:
                raise InputError(
                    "objective.form=importance needs the log-probs with which the rows were sampled, at this run's temperature "
                    "and without top_p and top_k; write them with sample_distributed and "
                    "selection._component_=pidistill.rollouts.selections.All, or set form: k2"
                )
            term, ratio, _ = ppo_clip_loss(
                scores.student_logprobs, batch.ratio_logprobs, token_gap(scores), clip_low=0.0, clip_high=math.inf
            )
            metrics = {"ratio_mean": ratio}
        term = weighted(self.token_weight, term, batch, scores)
        return TokenLoss(term.masked_fill(distill_weight(self.no_pi, batch) == 0, 0.0), metrics)
