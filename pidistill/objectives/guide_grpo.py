"""Guide-GRPO: the hint only where a whole group fails (arXiv 2506.13923).

    J = E_{y~μ}[ Σ_t min(ρ_t·A, clip(ρ_t, low, high)·A) ],  ρ_t = S(y_t|x)/sg μ(y_t),
    μ = S(·|x) where one of the group succeeds; S(·|x, I) for a second group of samples where none does

The student samples without privileged information; a group without any reward is sampled once more with it, and the ratio turns
what the hinted model wrote into an update of the model without the hint.

As in the authors' code, the samples with the hint replace the failed ones, whose group has no advantage: a round trains on as
many rollouts as plain GRPO and samples more; `rollouts` counts them all.

What we do differently from that code: one pair of clip bounds for both kinds of group, where it clips hinted ones wider (.8)
and reshapes their weights.
"""

from collections.abc import Sequence

from pidistill.objectives.base import Objective, check_advantage, check_clip, rollout_advantages
from pidistill.policy_gradient import ppo_clip_loss
from pidistill.token_weights import TokenWeight, weighted
from pidistill.types import Batch, Rollout, RolloutAdvantage, ScoreRequest, Scores, TokenLoss


class GuideGRPO(Objective):
    """PPO-clip on the student view; groups that fail are sampled again from the view with privileged information.

    Args:
        clip_low, clip_high, dual_clip, advantage, drop_zero_advantage: as in π-Distill.
        token_weight: see :mod:`pidistill.token_weights`; acts on the policy gradient.
    """

    uses_teacher = False
    guides_failed_groups = True

    def __init__(
        self,
        clip_low: float = 0.8,
        clip_high: float = 1.2,
        dual_clip: float | None = None,
        advantage: str = "group_mean",
        drop_zero_advantage: str | bool = False,
        token_weight: TokenWeight | None = None,
    ) -> None:
        check_advantage(advantage, drop_zero_advantage)
        check_clip(clip_low, clip_high, dual_clip)
        self.clip = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
        self.advantage, self.drop_zero_advantage, self.token_weight = advantage, drop_zero_advantage, token_weight

    def advantages(self, rollouts: Sequence[Rollout], step: int) -> list[RolloutAdvantage]:
        return rollout_advantages(rollouts, self.advantage, self.drop_zero_advantage)

    def score_request(self, step: int) -> ScoreRequest:
        return ScoreRequest(student_grad=True, teacher_grad=False, views=("student",))

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        loss, ratio, clipped = ppo_clip_loss(scores.student_logprobs, batch.sampled_logprobs, batch.advantages, **self.clip)
        return TokenLoss(weighted(self.token_weight, loss, batch, scores), {"ratio_mean": ratio, "clip_frac": clipped})
