"""Compute group-relative advantages: rewards [R] of whole groups in, one advantage per rollout out, in the reward's unit.

``groups`` [R] numbers the group of each rollout; rollouts of a group need not be neighbours, but a group must be whole: its
mean over a shard would be another number. A group whose rewards are all equal, a group of one among them, gets exactly 0.
Nothing here carries gradient.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pidistill.errors import InputError


def group_mean(rewards: Float[Tensor, " R"], groups: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Return R_i − mean of the group, i included (arXiv 2602.04942; no division by the standard deviation).

    Since the mean includes i, the expected policy gradient is (G−1)/G of the true one, G the group's size.
    """
    rewards = _finite(rewards)
    slot, size = group_slots(groups)
    mean = _group_sum(rewards, slot, size) / size
    # Exactly 0 where all are equal: the fp32 mean of three times 0.9 is off by 6e-8, which `standardised` would enlarge.
    return (rewards - mean[slot]).masked_fill(zero_advantage_groups(rewards, groups), 0.0)


def leave_one_out(rewards: Float[Tensor, " R"], groups: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Return R_i − mean of the *other* rollouts of the group (RLOO, arXiv 2402.14740): the policy gradient is unbiased.

    Equals ``group_mean``·G/(G−1); 0, not R_i, for a group of one, which has no baseline.
    """
    slot, size = group_slots(groups)
    return group_mean(rewards, groups) * size[slot] / (size - 1).clamp(min=1)[slot]


def standardised(rewards: Float[Tensor, " R"], groups: Int[Tensor, " R"], eps: float = 1e-4) -> Float[Tensor, " R"]:
    """Return (R_i − mean) / (std + eps), mean and unbiased std of the group, i included (GRPO, arXiv 2402.03300).

    A deviation from π-Distill, which does not divide. The scale of the reward drops out, and groups of little spread count as
    much as those of much. A KL in the reward is added after the division, so that β weighs it against a reward of unit spread.
    """
    centred = group_mean(rewards, groups)
    slot, size = group_slots(groups)
    variance = _group_sum(centred**2, slot, size) / (size - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)[slot]


def turn_returns(turn_rewards: Sequence[Sequence[float]], groups: Sequence[int]) -> list[list[float]]:
    """Return, per turn k of each rollout, its return from turn k on minus the group's mean return from turn k on.

    Process rewards as advantages: a turn is credited with what followed it, not with what came before. The mean is over the
    group's rollouts that reached turn k, i included; a rollout that is the only one there gets 0.
    """
    to_go = [[math.fsum(rewards[k:]) for k in range(len(rewards))] for rewards in turn_rewards]
    cells: dict[tuple[int, int], list[float]] = {}
    for group, returns in zip(groups, to_go, strict=True):
        for k, value in enumerate(returns):
            cells.setdefault((group, k), []).append(value)
    # Exactly 0 where all are equal, also where the mean is rounded.
    means = {cell: values[0] if len(set(values)) == 1 else math.fsum(values) / len(values) for cell, values in cells.items()}
    return [[value - means[group, k] for k, value in enumerate(returns)] for group, returns in zip(groups, to_go, strict=True)]


def zero_advantage_groups(rewards: Float[Tensor, " R"], groups: Int[Tensor, " R"]) -> Bool[Tensor, " R"]:
    """Return where all rewards of a rollout's group are equal, so that its advantage is 0 by every estimator here."""
    slot, size = group_slots(groups)
    extremes = [
        rewards.new_zeros(len(size)).scatter_reduce(0, slot, rewards, how, include_self=False) for how in ("amin", "amax")
    ]
    return (extremes[0] == extremes[1])[slot]


def group_slots(groups: Int[Tensor, " R"]) -> tuple[Int[Tensor, " R"], Int[Tensor, " K"]]:
    """Return the slot 0..K−1 of each rollout, in ascending order of its group's number, and the size of each slot."""
    _, slot, size = torch.unique(groups, return_inverse=True, return_counts=True)
    return slot, size


def _group_sum(values: Float[Tensor, " R"], slot: Int[Tensor, " R"], size: Int[Tensor, " K"]) -> Float[Tensor, " K"]:
    return values.new_zeros(len(size)).index_add(0, slot, values)


def _finite(rewards: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"rollout {bad[0]} of {len(rewards)} has reward {rewards[bad[0]].item()}, which would spread to its whole group; "
            "drop a rollout whose reward failed before taking advantages"
        )
    return rewards.detach()
