"""Estimate a KL from sampled tokens; each estimator says what its gradient is, which can be biased where the value is not.

Notation: y ~ p is the sampled token, ``logp`` and ``logq`` its log-prob under p and q, K_t the full-vocabulary KL(p||q) at
step t (``divergences.kl``). "Through p" is gradient through the policy that sampled y, "through q" through the other;
detach the side that is not meant. All values in nats per token. Expectations are on-policy: the first optimiser step
after sampling, without top-p or top-k. The claims are verified by exact enumeration in tests/losses/test_estimators.py.

The whole gradient of the sequence KL(p_θ||sg q), y ~ p_θ, with tokens weighed by how they move later KL:

    E[Σ_t ∇K_t] + E[Σ_t (Σ_{u>t} K_u)·∇log p(y_t)]
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pidistill.errors import InputError, check_share
from pidistill.losses.advantages import group_slots


def k1(logp: Float[Tensor, "*tokens"], logq: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """Return log p − log q of y ~ p. Value: unbiased for KL(p||q), of either sign.

    Gradient through p: E[∇log p(y)] = 0, noise without signal; never a loss there. Detached and summed into the sequence's
    reward it is the unbiased score-function estimator. Gradient through q: E[−∇log q(y)] = ∇_q KL(p||q), right as a loss.
    """
    return logp - logq


def k2(logp: Float[Tensor, "*tokens"], logq: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """Return ½(log p − log q)² of y ~ p. Value: biased for KL(p||q) (close where p ≈ q), never negative.

    Gradient through p: E[(log p − log q)·∇log p] = ∇_p KL(p||q) of the token, the expected gradient of K_t as a loss (of a
    sequence: the pathwise part, as ``loss_rb``). Gradient through q: E[(log q − log p)·∇log q], not a gradient of KL(p||q).
    """
    return 0.5 * (logp - logq) ** 2


def k3(logp: Float[Tensor, "*tokens"], logq: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """Return q/p − 1 − log(q/p) of y ~ p (Schulman 2020). Value: unbiased for KL(p||q) where p covers q, never negative.

    Gradient through p: E[(1 − q/p)·∇log p] = ∇_p KL(q||p), the other divergence's. Gradient through q: E[(q/p − 1)·∇log q] =
    ∇_q KL(p||q), right as a loss. q/p is not bounded here: log-ratios above 88 nats overflow to inf in fp32.
    """
    log_ratio = logq - logp
    return torch.expm1(log_ratio) - log_ratio


def kl_to_go(kl_per_token: Float[Tensor, " N"], rollout_index: Int[Tensor, " N"], gamma: float = 1.0) -> Float[Tensor, " N"]:
    """Return Σ_{u>t} γ^{u−t}·K_u within each rollout: the KL that comes *after* token t, which its choice can still move.

    Flat over policy tokens: a rollout's tokens are contiguous and in order; t counts policy tokens, so that γ ignores
    observations. γ = 0 gives 0 everywhere, γ = 1 the plain sum. Detached: it is a coefficient.

    Raises:
        InputError: γ outside [0, 1]; a rollout's tokens in more than one stretch.
    """
    check_share("kl_gamma", gamma, "0 leaves the future KL out, 1 counts all of it")
    stretches = rollout_index.unique_consecutive()
    if len(stretches) != len(stretches.unique()):
        raise InputError("a rollout's policy tokens are in more than one stretch; sort the tokens by rollout, then by position")
    # Doubling: after the pass with step s, value_t = Σ_{j<2s} γ^j K_{t+j}; log2(N) passes instead of N.
    value, step, n = kl_per_token.detach(), 1, len(kl_per_token)
    while step < n:
        later = torch.where(rollout_index[:-step] == rollout_index[step:], value[step:], 0.0)
        value = value + torch.nn.functional.pad(gamma**step * later, (0, step))
        step *= 2
    following = torch.where(rollout_index[:-1] == rollout_index[1:], value[1:], 0.0)
    return torch.nn.functional.pad(gamma * following, (0, min(n, 1)))


def leave_one_out_kl_to_go_baseline(
    to_go: Float[Tensor, " N"],
    rollout_index: Int[Tensor, " N"],
    token_index: Int[Tensor, " N"],
    groups: Int[Tensor, " R"],
) -> Float[Tensor, " N"]:
    """Return the mean over the *other* rollouts of the group of their KL-to-go at the same token index; 0 for a group of one.

    A sibling that has ended counts as 0 there: it has no KL to go. Siblings are drawn independently, so that subtracting this
    leaves the expected gradient as it is; without it 1,000 tokens of .1 nat would act like an advantage of 100.

    Args:
        rollout_index: [N] the rollout 0..R−1 of a token. token_index: [N] its index among the rollout's policy tokens.
        groups: [R] the group number of each rollout; whole groups.
    """
    if len(to_go) == 0:
        return to_go
    slot, size = group_slots(groups)
    group = slot[rollout_index]
    width = int(token_index.max()) + 1
    cell = group * width + token_index
    total = to_go.new_zeros(len(size) * width).index_add(0, cell, to_go)
    return (total[cell] - to_go) / (size[group] - 1).clamp(min=1)


def complete_kl_advantages(
    kls: Sequence[Float[Tensor, " _"]], groups: Sequence[int], gamma: float = 1.0
) -> list[Float[Tensor, " _"]]:
    """Return, per policy token, KL-to-go minus its leave-one-out baseline, which ``loss_rb_complete`` adds to K_t's gradient.

    To minimise β·KL, add β·K_t to the loss, and −β times this to the advantage of the policy that samples. γ = 0 gives 0
    (``loss_rb``), γ = 1 the whole gradient, in expectation. Detached.

    Args:
        kls: one tensor [T_i] per rollout: K_t at its policy tokens, in order, under the weights that sampled. T_i may be 0.
        groups: the group number of each rollout; whole groups.
    """
    if len(kls) != len(groups):
        raise InputError(f"{len(kls)} rollouts with a KL but {len(groups)} group numbers; give one of each per rollout")
    if not kls:
        return []
    lengths = [len(kl) for kl in kls]
    device = kls[0].device
    rollout_index = torch.arange(len(kls), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    token_index = torch.cat([torch.arange(length, device=device) for length in lengths])
    to_go = kl_to_go(torch.cat(list(kls)), rollout_index, gamma)
    group_numbers = torch.tensor(groups, dtype=torch.long, device=device)
    baseline = leave_one_out_kl_to_go_baseline(to_go, rollout_index, token_index, group_numbers)
    return list((to_go - baseline).split(lengths))
