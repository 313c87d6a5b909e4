"""Compute policy-gradient losses per token, to be minimised, in the advantage's unit; not masked, not averaged.

π is the policy in training (``logprobs`` [N], with gradient), μ the one that sampled; ρ = π/μ of the sampled token.
Advantages and μ are constants here: detached inside. Since log ρ ≤ −log μ(y), ρ overflows in fp32 only for a token sampled at a
probability below e^-88; a branch without gradient is cut *before* the exponential all the same, so that no 0·inf can arise.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pidistill.errors import InputError
from pidistill.losses.advantages import group_slots
from pidistill.losses.reductions import sum_by_rollout


def ppo_clip_loss(
    logprobs: Float[Tensor, " N"],
    denominator_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip_low: float = 0.8,
    clip_high: float = 1.2,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return −min(ρA, clip(ρ, low, high)·A) per token (arXiv 1707.06347, Eq. 7, multiplicative bounds), and its diagnostics.

    Coefficient of A·∇log π in J: for A>0 ρ if ρ ≤ high, else 0; for A<0 ρ if ρ ≥ low, else 0. Off-policy that means: a token
    that π finds unlikely is hardly reinforced (ρ ≈ 0), and one that it finds likely but bad is pushed down ρ times, unbounded.

    Args:
        denominator_logprobs: log μ, usually as recorded at sampling.
        clip_low, clip_high: bounds on ρ itself: 0.8 and 1.2, where other codes say ε = 0.2.
        dual_clip: c > 1 bounds −ρA by −c·A for A<0, so that ρ > c has no gradient either (arXiv 1912.09729).

    Returns:
        loss [N]; ρ [N], detached; clipped [N], True where a bound removed the gradient.

    Raises:
        InputError: bounds that are not 0 ≤ low ≤ 1 ≤ high, or a dual_clip ≤ 1.
    """
    if not 0.0 <= clip_low <= 1.0 <= clip_high:
        raise InputError(
            f"clip_low={clip_low}, clip_high={clip_high}: bounds multiply the ratio and need 0 <= low <= 1 <= high; for PPO's "
            "epsilon = 0.2 write clip_low: 0.8, clip_high: 1.2"
        )
    if dual_clip is not None and not dual_clip > 1.0:
        raise InputError(f"dual_clip={dual_clip} must be above 1 (it caps the ratio where the advantage is negative), or null")
    advantages = advantages.detach()
    log_ratio = logprobs - denominator_logprobs.detach()
    ratio = log_ratio.detach().exp()
    bound = torch.where(advantages > 0, torch.full_like(ratio, clip_high), torch.full_like(ratio, clip_low))
    clipped = ((advantages > 0) & (ratio > bound)) | ((advantages < 0) & (ratio < bound))
    if dual_clip is not None:
        capped = (advantages < 0) & (ratio > dual_clip)
        clipped, bound = clipped | capped, torch.where(capped, dual_clip, bound)
    constant = clipped | (advantages == 0)
    live_ratio = log_ratio.masked_fill(constant, 0.0).exp()
    return -advantages * torch.where(constant, bound, live_ratio), ratio, clipped


def topr_loss(
    logprobs: Float[Tensor, " N"],
    behaviour_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    low: float = 0.0,
    high: float = 1.0,
    level: str = "token",
    rollout_index: Int[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return −w·A·log π per token: w = 1 for A>0, w = sg clip(ρ, low, high) for A≤0 (TOPR, arXiv 2503.14286).

    The gradient of J is w·A·∇log π. Good samples are imitated at full weight however unlikely π finds them; bad ones are pushed
    down only as far as π would still produce them. Every token goes through exactly one branch, by its own advantage's sign.

    Args:
        low, high: truncation of ρ on the A≤0 branch.
        level: "token": ρ of the token; "sequence": ρ of its rollout, the product over the rollout's policy tokens, for which
            ``rollout_index`` [N], 0..B−1, says which tokens belong together; rollouts must be whole.

    Returns:
        loss [N] (a surrogate: its value means nothing); ρ [N] of the token at either level, detached, for the log.

    Raises:
        InputError: bounds that are not 0 ≤ low ≤ high; an unknown level; "sequence" without ``rollout_index``.
    """
    if not 0.0 <= low <= high:
        raise InputError(f"topr_low={low}, topr_high={high} must satisfy 0 <= topr_low <= topr_high")
    if level not in ("token", "sequence") or (level == "sequence" and rollout_index is None):
        raise InputError(f"topr_level={level} must be token, or sequence with a rollout_index")
    log_ratio = (logprobs - behaviour_logprobs).detach()
    log_weight = log_ratio
    if level == "sequence" and len(log_ratio):
        log_weight = sum_by_rollout(log_ratio, rollout_index, int(rollout_index.max()) + 1)[rollout_index]
    # Truncated before the exponential: the product over a sequence overflows easily.
    log_low = math.log(low) if low > 0 else -math.inf
    truncated = log_weight.clamp(log_low, math.log(high) if high > 0 else -math.inf).exp()
    return reinforce_loss(logprobs, torch.where(advantages > 0, 1.0, truncated) * advantages), log_ratio.exp()


def reinforce_loss(logprobs: Float[Tensor, " N"], advantages: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return −sg(A)·log π per token; the gradient of J is A·∇log π, right on-policy only. The value means nothing.

    A = 0 gives exactly 0, value and gradient, even at log π = −inf.
    """
    advantages = advantages.detach()
    return -advantages * logprobs.masked_fill(advantages == 0, 0.0)


def importance_weighted(loss: Float[Tensor, " N"], weights: Float[Tensor, " N"] | None) -> Float[Tensor, " N"]:
    """Multiply each token's loss with its constant weight (:mod:`pidistill.scoring.mismatch`); None leaves it unchanged."""
    return loss if weights is None else weights.detach() * loss


def snis_weights(
    student_logprobs: Float[Tensor, " R"],
    behaviour_logprobs: Float[Tensor, " R"],
    rewards: Float[Tensor, " R"],
    beta: float,
    groups: Int[Tensor, " R"],
) -> Float[Tensor, " R"]:
    """Return w_k = sg softmax_k(log S − log μ + R/β) per group; J = Σ_k w_k·log S(y_k) moves S towards S·exp(R/β).

    Self-normalised importance weights; they sum to 1 per group. Long sequences drive their ``effective_sample_size`` to 1.

    Args:
        student_logprobs, behaviour_logprobs: [R] summed over each rollout's policy tokens (exact), or per-token means
            (tempered: biased, but of usable effective sample size).
        beta: > 0, temperature of the reward in reward units per nat; small trusts the reward, large the sampler.
    """
    if not beta > 0.0:
        raise InputError(f"beta={beta} must be above 0 for self-normalised weights exp(R/beta)")
    scores = (student_logprobs - behaviour_logprobs + rewards / beta).detach()
    slot, size = group_slots(groups)
    peak = scores.new_zeros(len(size)).scatter_reduce(0, slot, scores, "amax", include_self=False)
    weights = (scores - peak[slot]).exp()
    return weights / weights.new_zeros(len(size)).index_add(0, slot, weights)[slot]


def effective_sample_size(weights: Float[Tensor, " R"], groups: Int[Tensor, " R"]) -> Float[Tensor, " K"]:
    """Return 1 / Σ_k w_k² per group (by number), for weights that sum to 1 per group: 1 (one rollout counts) to G (all)."""
    slot, size = group_slots(groups)
    return 1.0 / weights.new_zeros(len(size)).index_add(0, slot, weights**2)
