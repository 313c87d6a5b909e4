"""Distil on policy as PPO: the teacher's log-ratio is the advantage, with a trust region around the sampler.

    J = E_{y~μ}[ Σ_t clip-min(ρ_t, A_t) ] − β·kl(μ||S),  A_t = sg(log T − log S)(y_t),  ρ_t = S(y_t)/sg μ(y_t)

Several updates on one round of samples stay near it by the clip, and by the kl(behaviour||student): with y ~ μ its gradient is
that of −log S(y_t), so the term is estimated by log S of the sampled tokens, which costs nothing. Any teacher: another model,
or the model itself with privileged information.

What we do differently: rows without privileged information leave the objective (`no_pi: drop`) unless another model teaches.
"""

from pidistill.errors import check_choice
from pidistill.losses.policy_gradient import importance_weighted, ppo_clip_loss
from pidistill.losses.token_gap import token_gap
from pidistill.losses.token_weights import TokenWeight, divergences_of, weighted
from pidistill.objectives.base import BOTH_KLS, Number, Objective, check_clip, distill_weight
from pidistill.objectives.schedule import as_schedule
from pidistill.types import Batch, ScoreRequest, Scores, TokenLoss


class OPDPPO(Objective):
    """Train with PPO-clip whose advantage is, per token, the teacher's log-prob minus the student's.

    Args:
        beta: weight of the trust region kl(behaviour||student), or ``{start, end, steps}``; 0 for none.
        clip_low, clip_high, dual_clip: as in π-Distill.
        token_weight: see :mod:`pidistill.losses.token_weights`; acts on the policy gradient.
        no_pi: rows without privileged information: "drop" (counted), "error", "distill" (towards the teacher without it).
    """

    takes_importance_weights = True

    def __init__(
        self,
        beta: Number = 0.0,
        clip_low: float = 0.8,
        clip_high: float = 1.2,
        dual_clip: float | None = None,
        token_weight: TokenWeight | None = None,
        no_pi: str = "drop",
    ) -> None:
        check_choice("objective.no_pi", no_pi, ("distill", "drop", "error"))
        check_clip(clip_low, clip_high, dual_clip)
        self.beta = as_schedule("beta", beta, low=0.0, high=float("inf"))
        self.clip = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
        self.token_weight, self.no_pi = token_weight, no_pi

    def coefficients(self, step: int) -> dict[str, float]:
        return {"beta": self.beta(step)}

    def score_request(self, step: int) -> ScoreRequest:
        divergences = BOTH_KLS + divergences_of(self.token_weight)
        return ScoreRequest(student_grad=True, teacher_grad=False, divergences=divergences)

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        advantages = distill_weight(self.no_pi, batch) * token_gap(scores)
        loss, ratio, clipped = ppo_clip_loss(scores.policy_logprobs("student"), batch.ratio_logprobs, advantages, **self.clip)
        loss = importance_weighted(weighted(self.token_weight, loss, batch, scores), batch.importance_weights)
        loss = loss - self.beta(step) * scores.policy_logprobs("student")
        return TokenLoss(loss, {"ratio_mean": ratio, "clip_frac": clipped})
