"""Test the laws of the group-relative advantages, beside the loops that they must equal."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pidistill.losses.advantages import (
    group_mean,
    group_slots,
    leave_one_out,
    standardised,
    turn_returns,
    zero_advantage_groups,
)
from tests.support import oracles

ADVANTAGES = {"group_mean": group_mean, "leave_one_out": leave_one_out, "standardised": standardised}

rounds = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, 0.25, -0.3]) | st.floats(-2, 2, width=16), st.integers(-1, 3)), min_size=1, max_size=12
)


def as_tensors(case: list[tuple[float, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([r for r, _ in case], dtype=torch.float64), torch.tensor([g for _, g in case])


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_equal_the_loop(name):
    @settings(deadline=None)
    @given(rounds)
    def check(case):
        rewards, groups = as_tensors(case)
        expected = oracles.advantages(name, rewards.tolist(), groups.tolist())
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(ADVANTAGES[name](rewards, groups), expected, rtol=1e-10, atol=1e-10)

    check()


@settings(deadline=None)
@given(rounds, st.randoms())
def test_rollouts_of_a_group_need_not_be_neighbours(case, random):
    """statistics are those of the group, wherever its rollouts stand; ranks get whole groups (test_two_processes)."""
    order = list(range(len(case)))
    random.shuffle(order)
    rewards, groups = as_tensors(case)
    for function in ADVANTAGES.values():
        torch.testing.assert_close(function(rewards[order], groups[order]), function(rewards, groups)[order])


@settings(deadline=None)
@given(rounds)
def test_group_mean_is_leave_one_out_times_g_minus_1_over_g_and_sums_to_0_per_group(case):
    rewards, groups = as_tensors(case)
    slot, size = group_slots(groups)
    scale = ((size - 1) / size)[slot]
    torch.testing.assert_close(group_mean(rewards, groups), scale * leave_one_out(rewards, groups))
    sums = torch.zeros(len(size), dtype=torch.float64).index_add(0, slot, group_mean(rewards, groups))
    assert sums.abs().max() < 1e-12


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_and_groups_of_one_give_exactly_0(name):
    # In fp32 the mean of three times 0.9 is not 0.9, and a standard deviation of one rounding would make it an advantage.
    rewards = torch.tensor([0.9, 0.9, 0.9, 5.0, 0.0, 1.0])
    groups = torch.tensor([0, 0, 0, 1, 2, 2])
    got = ADVANTAGES[name](rewards, groups)
    assert (got[:4] == 0).all() and (got[4:] != 0).all()


def test_zero_advantage_groups_marks_equal_groups_only():
    rewards, groups = torch.tensor([1.0, 0.0, 1.0, 0.0, 7.0, -1.0, -1.0]), torch.tensor([5, 5, 3, 3, 0, 2, 2])
    assert zero_advantage_groups(rewards, groups).tolist() == [False, False, False, False, True, True, True]
    assert zero_advantage_groups(torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []


@settings(deadline=None)
@given(rounds)
def test_zero_advantage_groups_are_those_whose_rewards_are_all_equal(case):
    rewards, groups = as_tensors(case)
    expected = [len({r for r, g in case if g == group}) == 1 for _, group in case]
    assert zero_advantage_groups(rewards, groups).tolist() == expected


@pytest.mark.parametrize("size", [2, 3])
def test_expected_policy_gradient_of_leave_one_out_is_true_and_of_the_group_mean_g_minus_1_over_g(size):
    # A bandit with 3 arms: every group of `size` draws, weighted with its probability.
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    arm_rewards = torch.tensor([1.0, 0.25, -0.5], dtype=torch.float64)
    logp = torch.log_softmax(logits, -1)
    (truth,) = torch.autograd.grad((logp.exp() * arm_rewards).sum(), logits, retain_graph=True)
    draws = torch.tensor(list(itertools.product(range(3), repeat=size)))
    groups = torch.arange(len(draws)).repeat_interleave(size)
    probability = logp.detach().exp()[draws].prod(1)
    for function, scale in ((leave_one_out, 1.0), (group_mean, (size - 1) / size)):
        advantages = function(arm_rewards[draws].flatten(), groups).view(-1, size)
        surrogate = (probability * (advantages * logp[draws]).mean(1)).sum()
        (gradient,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
        torch.testing.assert_close(gradient, scale * truth, rtol=1e-12, atol=1e-12)


def test_standardised_has_unit_spread_whatever_the_scale_of_the_reward():
    rewards, groups = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    small, large = standardised(rewards, groups), standardised(1000 * rewards, groups)
    torch.testing.assert_close(small, large, rtol=1e-4, atol=0)
    assert large.std().item() == pytest.approx(1.0, rel=1e-6)


def test_a_reward_that_is_not_finite_is_refused_by_name():
    rewards = torch.tensor([0.0, float("nan"), 1.0])
    for function in ADVANTAGES.values():
        with pytest.raises(ValueError, match=r"rollout 1 of 3 has reward nan"):
            function(rewards, torch.zeros(3, dtype=torch.long))


# ---------------------------------------------------------------------------------------- turns with rewards of their own

episodes = st.lists(
    st.tuples(st.lists(st.sampled_from([0.0, 1.0, 1 / 3, -0.1]), min_size=1, max_size=4), st.integers(0, 2)), max_size=8
)


def returns_by_loop(turn_rewards: list[list[float]], groups: list[int]) -> list[list[float]]:
    result = []
    for own, group in zip(turn_rewards, groups, strict=True):
        values = []
        for k in range(len(own)):
            reached = [sum(r[k:]) for r, g in zip(turn_rewards, groups, strict=True) if g == group and len(r) > k]
            values.append(sum(own[k:]) - sum(reached) / len(reached))
        result.append(values)
    return result


def flat(nested: list[list[float]]) -> torch.Tensor:
    return torch.tensor([x for values in nested for x in values], dtype=torch.float64)


@settings(deadline=None)
@given(episodes, st.randoms())
def test_turn_returns_equal_the_loop_in_any_order(case, random):
    random.shuffle(case)
    rewards, groups = [r for r, _ in case], [g for _, g in case]
    ours = turn_returns(rewards, groups)
    assert [len(values) for values in ours] == [len(r) for r in rewards]
    torch.testing.assert_close(flat(ours), flat(returns_by_loop(rewards, groups)), rtol=1e-12, atol=1e-12)
    order = list(range(len(case)))
    random.shuffle(order)
    again = turn_returns([rewards[i] for i in order], [groups[i] for i in order])
    assert again == [ours[i] for i in order]


@settings(deadline=None)
@given(episodes)
def test_turn_returns_sum_to_0_over_the_rollouts_that_reached_the_turn(case):
    rewards, groups = [r for r, _ in case], [g for _, g in case]
    ours = turn_returns(rewards, groups)
    for group in set(groups):
        for k in range(4):
            reached = [values[k] for values, g in zip(ours, groups, strict=True) if g == group and len(values) > k]
            assert abs(sum(reached)) < 1e-12
            if len(set(reached)) == 1:
                assert reached[0] == 0.0  # alone there, or equal: exactly


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.25]), st.integers(0, 2)), min_size=1, max_size=8), st.integers(1, 4))
def test_turn_returns_are_the_group_mean_where_all_is_paid_at_the_end(case, turns):
    """Every rollout reaches the last turn, which alone is rewarded: each of its turns has the whole advantage."""
    rewards, groups = as_tensors(case)
    ours = turn_returns([[0.0] * (turns - 1) + [r] for r in rewards.tolist()], groups.tolist())
    expected = group_mean(rewards, groups)[:, None].expand(-1, turns)
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)


def test_turn_returns_credit_a_turn_with_what_follows_it():
    assert turn_returns([[1.0, 0.0], [0.0, 1.0]], [0, 0]) == [[0.0, -0.5], [0.0, 0.5]]
    assert turn_returns([], []) == []
