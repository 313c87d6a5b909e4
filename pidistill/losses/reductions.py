"""Reduce one number per policy token to the scalar of a micro-batch, such that the micro-batches of a step add up.

The denominator is the whole optimiser step's, over all ranks and micro-batches, and is known before the first backward; a mean
within each micro-batch would weigh tokens by how full their micro-batch is. Where ranks average their gradients (FSDP2, DDP),
the recipe multiplies the scalar by the number of data-parallel ranks.
"""

from jaxtyping import Float, Int
from torch import Tensor


def token_mean(per_token: Float[Tensor, " N"], total_tokens: int | Tensor) -> Float[Tensor, ""]:
    """Return Σ_n per_token_n / total_tokens: every policy token of the step weighs the same.

    Without tokens (N = 0) a finite 0 that keeps ``per_token``'s grad_fn, so that this rank takes part in the backward's
    collectives. ``total_tokens`` 0 gives 0 too, never NaN.

    Args:
        total_tokens: policy tokens of the whole optimiser step (all ranks and micro-batches), not of this micro-batch.
    """
    return per_token.sum() / _at_least_one(total_tokens)


def sum_by_rollout(
    per_token: Float[Tensor, " N"], rollout_index: Int[Tensor, " N"], rollouts: int
) -> Float[Tensor, " {rollouts}"]:
    """Return Σ over each rollout's tokens, [rollouts]; 0 for a rollout without tokens. Differentiable."""
    return per_token.new_zeros(rollouts).index_add(0, rollout_index, per_token)


def _at_least_one(total: int | Tensor) -> int | Tensor:
    return total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
