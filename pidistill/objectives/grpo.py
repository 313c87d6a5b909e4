"""Train with GRPO, the control of reinforcement learning: no privileged information, no KL (arXiv 2402.03300, Eq. 3, β=0).

    J = E_{y~S}[ Σ_t min(ρ_t·A, clip(ρ_t, low, high)·A) ],  ρ_t = S(y_t)/sg μ(y_t),  A from the reward within the group

What we do differently from the paper: one denominator for the whole optimiser step (its number of policy tokens) in place of
1/length per sequence, and `advantage: group_mean` by default, without dividing by the group's standard deviation
(`standardised` is theirs, `leave_one_out` is RLOO, `turn_returns` credits each turn of an agent with the process rewards that
follow it). It is OPSD with β=0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pidistill.errors import InputError
from pidistill.losses.policy_gradient import importance_weighted, ppo_clip_loss
from pidistill.losses.rollout_advantages import rollout_advantages
from pidistill.losses.token_weights import TokenWeight, divergences_of, weighted
from pidistill.objectives.base import BOTH_KLS, Objective, check_advantage, check_clip
from pidistill.types import Batch, Rollout, RolloutAdvantage, ScoreRequest, Scores, TokenLoss


def with_teacher(method: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of :class:`GRPO` for a method that cannot do without the teacher's view."""
    if more.get("report_teacher_kl") is False:
        raise InputError(
            f"objective.report_teacher_kl=False has no effect on {method}, which compares student and teacher; remove the key"
        )
    return {**more, "report_teacher_kl": True}


class GRPO(Objective):
    """Train with PPO-clip on the student's own samples, with group-relative advantages.

    Args:
        clip_low, clip_high, dual_clip, advantage, drop_zero_advantage: as in π-Distill.
        report_teacher_kl: also run the view with privileged information, without gradient, to log both KLs; one more forward.
        token_weight: see :mod:`pidistill.losses.token_weights`; acts on the policy gradient.
    """

    no_pi = "rl"
    takes_importance_weights = True

    def __init__(
        self,
        clip_low: float = 0.8,
        clip_high: float = 1.2,
        dual_clip: float | None = None,
        advantage: str = "group_mean",
        drop_zero_advantage: str | bool = False,
        report_teacher_kl: bool = False,
        token_weight: TokenWeight | None = None,
    ) -> None:
        check_advantage(advantage, drop_zero_advantage)
        check_clip(clip_low, clip_high, dual_clip)
        self.clip = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
        self.advantage, self.drop_zero_advantage = advantage, drop_zero_advantage
        self.uses_teacher, self.token_weight = report_teacher_kl, token_weight

    def advantages(self, rollouts: Sequence[Rollout], step: int) -> list[RolloutAdvantage]:
        return rollout_advantages(rollouts, self.advantage, self.drop_zero_advantage)

    def score_request(self, step: int) -> ScoreRequest:
        if self.uses_teacher:
            divergences = BOTH_KLS + divergences_of(self.token_weight)
            return ScoreRequest(student_grad=True, teacher_grad=False, divergences=divergences)
        return ScoreRequest(student_grad=True, teacher_grad=False, views=("student",))

    def token_advantages(self, batch: Batch, scores: Scores, step: int) -> Float[Tensor, " N"]:
        """Return the advantage of each token: that of its rollout; methods that change it say how."""
        return batch.advantages

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        student, advantages = scores.policy_logprobs("student"), self.token_advantages(batch, scores, step)
        loss, ratio, clipped = ppo_clip_loss(student, batch.ratio_logprobs, advantages, **self.clip)
        loss = importance_weighted(weighted(self.token_weight, loss, batch, scores), batch.importance_weights)
        return TokenLoss(loss, {"ratio_mean": ratio, "clip_frac": clipped})
