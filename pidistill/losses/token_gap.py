"""Compute advantages and factors per token from the token gap Δ = log T − log S of the sampled token, as published methods do.

Δ is taken at the weights of the current update, over the whole vocabulary, and is a constant: gradient reaches the policy
gradient that the number multiplies, and nothing else. Each expected gradient is therefore a function of S and T at fixed
prefixes, and is checked by enumeration in tests/objectives/test_token_gap.py.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pidistill.errors import InputError
from pidistill.types import Scores


def token_gap(scores: Scores) -> Float[Tensor, " N"]:
    """Return Δ = sg(log T − log S) of each sampled token."""
    if scores.teacher_logprobs is None:
        raise InputError("the token gap needs the teacher's log-probs, and this `objective` does not score the teacher's view")
    return (scores.teacher_logprobs - scores.student_logprobs).detach()


def gated_advantage(gap: Float[Tensor, " N"], gate_beta: float, *, centred: bool) -> Float[Tensor, " N"]:
    """Return σ(gate_beta·Δ) − ½, or without the ½ as published (SDAR, arXiv 2605.15155).

    A constant changes no expected gradient, so that both have the same one; centred it has less variance, and is exactly 0
    where teacher and student agree.
    """
    return torch.sigmoid(gate_beta * gap) - (0.5 if centred else 0.0)


def proximal_advantage(gap: Float[Tensor, " N"], alpha: float) -> Float[Tensor, " N"]:
    """Return log(1 − α + α·T/S): the log-ratio to the teacher α·T + (1−α)·S (TOP-D, arXiv 2607.04751).

    At least log(1−α): a token that the teacher rules out is pushed down by a bounded amount. Σ_v S(v)·exp A(v) = 1. Its
    expected gradient is that of −kl(S || sg(α·T + (1−α)·S)) at fixed prefixes. α=1 is Δ itself.
    """
    if alpha == 1.0:
        return gap
    near = torch.log1p(alpha * torch.expm1(gap.clamp(max=30.0)))  # exactly 0 where both agree
    return torch.where(gap > 30.0, math.log(alpha) + gap, near)


def credit_factor(
    gap: Float[Tensor, " N"], advantages: Float[Tensor, " N"], weight: float, clip: float, only: str = "all"
) -> Float[Tensor, " N"]:
    """Return (1−λ) + λ·clip(exp(sign(A)·Δ), 1−ε, 1+ε), which multiplies A: the size from the gap, the sign from the reward.

    RLSD, arXiv 2604.03128, Algorithm 1. |factor − 1| ≤ λ·ε, so that the sign of A never changes.

    Args:
        weight, clip: λ and ε.
        only: "negative" and "positive" leave the factor at 1 for rollouts of the other sign.
    """
    likelier = (torch.sign(advantages) * gap).clamp(min=math.log(1.0 - clip), max=math.log(1.0 + clip)).exp()
    factor = (1.0 - weight) + weight * likelier
    chosen = {"all": advantages != 0, "negative": advantages < 0, "positive": advantages > 0}[only]
    return torch.where(chosen, factor, 1.0)
