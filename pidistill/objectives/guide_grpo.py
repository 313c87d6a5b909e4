"""Train with Guide-GRPO: the hint only where a whole group fails (arXiv 2506.13923).

    J = E_{y~μ}[ Σ_t min(ρ_t·A, clip(ρ_t, low, high)·A) ],  ρ_t = S(y_t|x)/sg μ(y_t),
    μ = S(·|x) where one of the group succeeds; S(·|x, I) for a second group of samples where none does

The student samples without privileged information; a group without any reward is sampled once more with it, and the ratio
turns what the hinted model wrote into an update of the model without the hint. As in the authors' code, hinted samples
replace the failed ones, whose group has no advantage: a round trains on as many rollouts as plain GRPO and samples more.

What we do differently from that code: hinted tokens have the same ratio and clip as all others, where it leaves them unclipped
and reshapes their ratio to ρ/(ρ + γ), γ a quantile of the hinted ratios. With a plain ratio, tokens that the model would
hardly write without the hint (ρ ≈ 0) are hardly lifted.
"""

from pidistill.objectives.grpo import GRPO


class GuideGRPO(GRPO):
    """Run :class:`GRPO`, arguments included, on rounds whose failed groups are sampled again with the hint."""

    guides_failed_groups = True
