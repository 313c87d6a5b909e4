"""Distil with OPSD in its reward form: on policy, from the student's own samples (arXiv 2602.04942, Eq. 5).

    J = E_{y~S}[R(y)] − β·kl(S||sg T)

S is θ without privileged information and samples; T, the view with it, scores what S wrote and never gets gradient. The paper's
teacher is the live θ; `teacher` in the config also takes frozen and EMA weights.

What we do differently from the paper: `kl_mode: loss_rb` is the default, as in π-Distill, and β multiplies the KL summed over
the sequence, where the authors' trainer averages it over tokens. The KL estimators are those of π-Distill, with the roles of
the views exchanged.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from pidistill.errors import InputError, check_choice
from pidistill.losses.policy_gradient import importance_weighted, ppo_clip_loss
from pidistill.losses.rollout_advantages import rollout_advantages
from pidistill.losses.sampling_kl import SamplingKL
from pidistill.losses.token_weights import TokenWeight, divergences_of, weighted
from pidistill.objectives.base import (
    BOTH_KLS,
    Number,
    Objective,
    check_advantage,
    check_clip,
    check_token_weight,
    distill_weight,
    drop_untold,
)
from pidistill.objectives.schedule import as_schedule
from pidistill.types import Batch, Rollout, RolloutAdvantage, ScoreRequest, Scores, TokenLoss


class OPSD(Objective):
    """Run PPO on the student's own samples plus β·kl(S||sg T).

    Args:
        beta: weight of the KL in nats summed over the sequence, or ``{start, end, steps}``. The paper uses 0.5, which the
            authors' trainer applies to the KL's mean over tokens: `token_weight: MeanOverTokens` here, or
            `kl_reward_scale: token_mean` with `kl_mode: reward_rb`.
        kl_mode, kl_gamma, kl_reward_scale: how the KL is estimated; see ``losses.sampling_kl.KL_MODES``.
        reward_weight: weight of the policy-gradient term; 0 is distillation without a reward.
        clip_low, clip_high, dual_clip, advantage, drop_zero_advantage: as in π-Distill.
        token_weight: see :mod:`pidistill.losses.token_weights`; acts on the KL where it is a loss.
        no_pi: as in π-Distill; null is "rl", or "drop" where reward_weight is 0 (nothing is left to learn from such a row).
    """

    takes_importance_weights = True

    def __init__(
        self,
        beta: Number = 0.5,
        kl_mode: str = "loss_rb",
        kl_gamma: float = 1.0,
        kl_reward_scale: str = "sum",
        reward_weight: Number = 1.0,
        clip_low: float = 0.8,
        clip_high: float = 1.2,
        dual_clip: float | None = None,
        advantage: str = "group_mean",
        drop_zero_advantage: str | bool = False,
        no_pi: str | None = None,
        token_weight: TokenWeight | None = None,
    ) -> None:
        check_choice("objective.no_pi", no_pi, (None, "rl", "distill", "drop", "error"))
        check_clip(clip_low, clip_high, dual_clip)
        self.beta = as_schedule("beta", beta, low=0.0, high=float("inf"))
        self.reward_weight = as_schedule("reward_weight", reward_weight, low=0.0, high=float("inf"))
        self.kl = SamplingKL("student", kl_mode, kl_gamma, kl_reward_scale)
        check_advantage(advantage, drop_zero_advantage, self.kl)
        check_token_weight(token_weight, self.kl)
        self.token_weight = token_weight
        self.clip = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
        reward_free = self.reward_weight.start == self.reward_weight.end == 0.0
        if reward_free and self.beta.start == self.beta.end == 0.0:
            raise InputError("objective.beta=0 and objective.reward_weight=0 leave nothing to train; raise one of them")
        self.advantage, self.drop_zero_advantage = advantage, drop_zero_advantage
        self.no_pi = no_pi or ("drop" if reward_free else "rl")
        self.needs_present_samples = self.kl.needs_present_samples

    def behaviour_request(self) -> ScoreRequest | None:
        return self.kl.behaviour_request()

    def behaviour_values(self, scores: Scores) -> Float[Tensor, " N"]:
        return self.kl.behaviour_values(scores)

    def advantages(self, rollouts: Sequence[Rollout], step: int) -> list[RolloutAdvantage]:
        kl = self.kl.advantages(rollouts, self.beta(step), self.advantage, self.no_pi)
        result = rollout_advantages(rollouts, self.advantage, self.drop_zero_advantage, kl, kl_in_reward=self.kl.in_reward)
        return drop_untold(self.no_pi, rollouts, result)

    def coefficients(self, step: int) -> dict[str, float]:
        return {"beta": self.beta(step), "reward_weight": self.reward_weight(step)}

    def score_request(self, step: int) -> ScoreRequest:
        divergences = BOTH_KLS + self.kl.loss_divergences() + divergences_of(self.token_weight)
        return ScoreRequest(student_grad=True, teacher_grad=False, divergences=divergences)

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        """Return −J per policy token; gradient through S only."""
        advantages = self.reward_weight(step) * batch.advantages
        if batch.kl_advantages is not None:
            advantages = advantages + batch.kl_advantages
        loss, ratio, clipped = ppo_clip_loss(scores.policy_logprobs("student"), batch.ratio_logprobs, advantages, **self.clip)
        loss, kl = importance_weighted(loss, batch.importance_weights), self.kl.token_loss(scores)
        if kl is not None:
            loss = loss + self.beta(step) * distill_weight(self.no_pi, batch) * weighted(self.token_weight, kl, batch, scores)
        return TokenLoss(loss, {"ratio_mean": ratio, "clip_frac": clipped})
