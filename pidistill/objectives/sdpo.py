"""Train with SDPO: self-distillation from what a round itself reveals (arXiv 2601.20802).

    J = −E_{y~S}[ Σ_t sg(min(S/μ, c))_t · D_t ],  T = θ̄ with, in its prompt, a successful sibling of y and / or the
                                                  environment's feedback on y;  D over the student's top-k tokens and a tail

The privileged information does not exist before the round is sampled: `hindsight` in the config
(:class:`pidistill.privileged.Hindsight`) finds it. D is `kl_teacher_student`, `kl_student_teacher` (the source's α = 0 and 1)
or the JSD (α = .5); θ̄ a moving average (`EMATeacher`, rate .05) or the trust region (`TrustRegionTeacher`, .99 of the initial
logits).

What we do differently: rollouts without privileged information (no sibling succeeded, no feedback) fall back to GRPO on the
reward (`no_pi: rl`), where the source leaves them out (`no_pi: drop`, out of the denominator too); `rollouts_with_pi_frac`
tells how many had any.
"""

from collections.abc import Sequence

import torch

from pidistill.errors import InputError, check_choice
from pidistill.losses.policy_gradient import ppo_clip_loss
from pidistill.losses.rollout_advantages import rollout_advantages
from pidistill.losses.token_weights import TokenWeight, weighted
from pidistill.objectives.base import Objective, check_clip, distill_request, distill_weight, drop_untold, student_divergence
from pidistill.types import Batch, Rollout, RolloutAdvantage, ScoreRequest, Scores, TokenLoss


class SDPO(Objective):
    """Minimise a top-k divergence from a lagged teacher that sees hindsight; GRPO where there is none.

    Args:
        divergence: "kl_teacher_student", "kl_student_teacher", "jsd", or the dotted path of a function of one's own.
        jsd_beta: weight of the teacher in the mixture of "jsd"; inside (0, 1).
        top_k: the student's K most probable tokens, the rest one bucket; null for the full vocabulary. The source: 20 to 100.
        importance_clip: c, the bound on S/μ; null for no importance weight.
        clip_low, clip_high, dual_clip, advantage: of the GRPO fallback, as in π-Distill.
        token_weight: see :mod:`pidistill.losses.token_weights`; acts on the divergence.
        no_pi: rollouts without privileged information: "rl" (GRPO), "distill" (where another model teaches), "drop", "error".
            The first three hold for single turns without any too, where the environment gives it turn by turn.
    """

    def __init__(
        self,
        divergence: str = "jsd",
        jsd_beta: float = 0.5,
        top_k: int | None = 100,
        importance_clip: float | None = 2.0,
        clip_low: float = 0.8,
        clip_high: float = 1.2,
        dual_clip: float | None = None,
        advantage: str = "group_mean",
        token_weight: TokenWeight | None = None,
        no_pi: str = "rl",
    ) -> None:
        check_choice("objective.no_pi", no_pi, ("rl", "distill", "drop", "error"))
        check_choice("objective.advantage", advantage, ("group_mean", "leave_one_out", "standardised"))
        check_clip(clip_low, clip_high, dual_clip)
        if importance_clip is not None and not importance_clip > 0.0:
            raise InputError(f"objective.importance_clip={importance_clip} must be above 0 (a bound on S/μ), or null for none")
        self.divergence = student_divergence(divergence, jsd_beta, top_k=top_k)
        self.clip = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
        self.importance_clip, self.advantage = importance_clip, advantage
        self.token_weight, self.no_pi = token_weight, no_pi

    def advantages(self, rollouts: Sequence[Rollout], step: int) -> list[RolloutAdvantage]:
        without = [any(rollout.tokens_with_privileged()) for rollout in rollouts].count(False)
        if without and self.no_pi == "error":
            raise InputError(
                f"{without} of the round's {len(rollouts)} rollouts have no privileged information, and objective.no_pi=error; "
                "give hindsight a feedback, or set objective.no_pi to rl or drop"
            )
        return drop_untold(self.no_pi, rollouts, rollout_advantages(rollouts, self.advantage, drop_zero_advantage=False))

    def score_request(self, step: int) -> ScoreRequest:
        return distill_request(self.divergence, self.token_weight)

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        fallback, ratio, clipped = ppo_clip_loss(
            scores.policy_logprobs("student"), batch.ratio_logprobs, batch.advantages, **self.clip
        )
        importance = 1.0 if self.importance_clip is None else ratio.clamp(max=self.importance_clip)
        distilled = importance * weighted(self.token_weight, scores.divergences[self.divergence], batch, scores)
        distils = distill_weight(self.no_pi, batch) > 0
        falls_back = ~distils & (self.no_pi != "drop")  # a kept rollout can have turns without information
        loss = torch.where(distils, distilled, fallback.masked_fill(~falls_back, 0.0))
        return TokenLoss(loss, {"ratio_mean": ratio, "clip_frac": clipped & falls_back})
