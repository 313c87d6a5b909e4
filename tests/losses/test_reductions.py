"""Test the reductions: micro-batches add up, and nothing makes a NaN or loses the graph."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pidistill.losses.reductions import sum_by_rollout, token_mean

rollouts = st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=5), min_size=1, max_size=6)


def flat(case: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor([x for rollout in case for x in rollout], dtype=torch.float64)
    return values, torch.tensor([i for i, rollout in enumerate(case) for _ in rollout], dtype=torch.long)


@settings(deadline=None)
@given(rollouts, st.integers(0, 6))
def test_any_split_into_micro_batches_adds_up_to_the_loop(case, cut):
    parts = [case[:cut], case[cut:]]
    tokens = sum(len(rollout) for rollout in case)
    by_token = sum(x for rollout in case for x in rollout) / tokens
    got = torch.stack([token_mean(flat(part)[0], tokens) for part in parts]).sum()
    assert got.item() == pytest.approx(by_token, abs=1e-12)


def test_gradients_are_the_weights_of_the_tokens():
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    index = torch.tensor([0, 0, 1])
    (gradient,) = torch.autograd.grad(token_mean(values, 8), values)
    assert gradient.tolist() == [1 / 8] * 3
    (gradient,) = torch.autograd.grad(sum_by_rollout(values, index, 2)[1], values)
    assert gradient.tolist() == [0, 0, 1]


@pytest.mark.parametrize("total", [0, 7, torch.tensor(0), torch.tensor(7)])
def test_no_policy_token_gives_a_finite_zero_with_a_graph(total):
    parameter = torch.ones(3, requires_grad=True)
    value = token_mean((parameter * 2.0)[:0], total)
    assert value.item() == 0.0 and value.grad_fn is not None
    (gradient,) = torch.autograd.grad(value, parameter)
    assert (gradient == 0).all()


def test_a_tensor_total_is_the_integer_total():
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(token_mean(values, torch.tensor(5)), token_mean(values, 5))


def test_sum_by_rollout_gives_0_to_a_rollout_without_tokens():
    assert sum_by_rollout(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 2]), 4).tolist() == [1.0, 0.0, 5.0, 0.0]
