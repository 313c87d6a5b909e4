"""The distribution that tokens are drawn from, and the draw."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor


def sampling_logprobs(
    logits: Float[Tensor, "B V"], temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "B V"]:
    """Log of the distribution that tokens are drawn from: log_softmax(logits / temperature), truncated and renormalised.

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


def inverse_cdf(logprobs: Float[Tensor, "B V"], uniforms: Float64[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The first token at which the cumulative probability, in id order and float64, exceeds the uniform of [0, 1).

    A token of probability 0 adds nothing to the sum, so it is never the first to exceed anything.
    """
    probs = logprobs.double().exp()
    cdf = probs.cumsum(dim=-1)
    # The sum is 1 up to rounding: scaling, and staying below it, keeps the last token that has probability reachable.
    total = cdf[:, -1]
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cdf, target[:, None], right=True)[:, 0].clamp(max=logprobs.shape[-1] - 1)
    # A GPU's parallel sum may step by a rounding error where the probability is 0.
    impossible = probs.gather(1, ids[:, None])[:, 0] == 0
    return torch.where(impossible, probs.argmax(dim=-1), ids)
