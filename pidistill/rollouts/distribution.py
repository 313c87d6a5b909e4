"""Make the distribution that tokens are drawn from, and draw from it."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

_BLOCK = 256


def sampling_logprobs(
    logits: Float[Tensor, "B V"], temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "B V"]:
    """Return the log-probs that tokens are drawn with: log_softmax(logits / temperature), truncated and renormalised.

    As in Hugging Face's `generate`: temperature first, then top-k, then top-p on what top-k left. Dropped tokens are -inf.
    A token is outside top-p where the tokens before it, in order of probability, already reach ``top_p``.
    """
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    truncated = logprobs
    if top_k is not None and top_k < logits.shape[-1]:
        kth = truncated.topk(top_k, dim=-1).values[:, -1:]
        truncated = truncated.masked_fill(truncated < kth, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = truncated.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        truncated = truncated.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    return logprobs if truncated is logprobs else torch.log_softmax(truncated, dim=-1)


def draw(scores: Float[Tensor, "B V"], uniforms: Float64[Tensor, " B"]) -> tuple[Int[Tensor, " B"], Float64[Tensor, " B"]]:
    """Draw by inverse CDF from softmax(scores): the first id whose cumulative probability exceeds the uniform of [0, 1).

    An id of probability 0 (score -inf) adds nothing to the sum, so it is never the first to exceed anything. The sum runs over
    blocks, then over the ids of one block, in float64; no copy of the vocabulary is made. ``scores`` is overwritten.

    Returns:
        ids, and their log-probs in nats: log softmax(scores) at the id. Not finite where the scores are not.
    """
    weights = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
    sums = _block_sums(weights).double()
    total = sums.sum(dim=-1, keepdim=True)
    block, rest = _first_above(sums, uniforms[:, None] * total)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=scores.device)
    inside = weights.gather(1, columns.clamp(max=scores.shape[1] - 1)).double().masked_fill(columns >= scores.shape[1], 0.0)
    place, _ = _first_above(inside, rest)
    return (block * _BLOCK + place)[:, 0], (inside.gather(1, place) / total).log()[:, 0]


def _block_sums(weights: Float[Tensor, "B V"]) -> Float[Tensor, "B blocks"]:
    whole = weights.shape[1] // _BLOCK * _BLOCK
    return torch.cat(
        [weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(dim=-1), weights[:, whole:].sum(dim=-1, keepdim=True)], 1
    )


def _first_above(
    weights: Float64[Tensor, "B n"], target: Float64[Tensor, "B 1"]
) -> tuple[Int[Tensor, "B 1"], Float64[Tensor, "B 1"]]:
    """Return where the running sum of the weights first exceeds the target, and the target minus the sum before it."""
    cdf = weights.cumsum(dim=-1)
    # Sums that were rounded in another order may end below the target: staying below the end keeps the last place reachable.
    target = torch.minimum(target, torch.nextafter(cdf[:, -1:], torch.zeros_like(target)))
    place = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[1] - 1)
    # A GPU's parallel sum may step by a rounding error where the weight is 0.
    place = torch.where(weights.gather(1, place) == 0, weights.argmax(dim=-1, keepdim=True), place)
    return place, (target - (cdf.gather(1, place) - weights.gather(1, place))).clamp(min=0)
