"""Test the policy-gradient losses: values against the formula, gradients against the table of coefficients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pidistill.losses.policy_gradient import effective_sample_size, ppo_clip_loss, reinforce_loss, snis_weights, topr_loss
from tests.support import oracles

RATIOS = [1e-6, 0.3, 0.79, 0.8, 0.81, 1.0, 1.19, 1.2, 1.21, 2.9, 3.0, 3.1, 50.0]
GRID = list(itertools.product(RATIOS, [2.0, 0.5, 0.0, -0.5, -2.0]))


def at(ratios: list[float], behaviour: float = -1.7) -> tuple[torch.Tensor, torch.Tensor]:
    """(log π with gradient, log μ) of the given ratios, float64."""
    log_mu = torch.full((len(ratios),), behaviour, dtype=torch.float64)
    return (log_mu + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_(), log_mu


def nudged(ratio: float) -> float:
    """The ratio as the function sees it, after log and exp."""
    logp, log_mu = at([ratio])
    return (logp - log_mu).exp().item()


# ------------------------------------------------------------------------------------------------ PPO


@pytest.mark.parametrize(("low", "high"), [(0.8, 1.2), (0.0, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_ppo_value_gradient_and_clip_flag_equal_the_table(low, high, dual_clip):
    ratios, advantages = ([row[column] for row in GRID] for column in (0, 1))
    logp, log_mu = at(ratios)
    A = torch.tensor(advantages, dtype=torch.float64, requires_grad=True)
    log_mu.requires_grad_()
    loss, ratio, clipped = ppo_clip_loss(logp, log_mu, A, low, high, dual_clip)
    seen = [nudged(r) for r in ratios]
    value = [-oracles.ppo_objective(r, a, low, high, dual_clip) for r, a in zip(seen, advantages, strict=True)]
    torch.testing.assert_close(loss, torch.tensor(value, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    table = [oracles.ppo_coefficient(r, a, low, high, dual_clip) for r, a in zip(seen, advantages, strict=True)]
    coefficient = torch.tensor(table, dtype=torch.float64)
    gradients = torch.autograd.grad(loss.sum(), (logp, log_mu, A), allow_unused=True)
    torch.testing.assert_close(gradients[0], -coefficient, rtol=1e-12, atol=1e-12)
    assert gradients[1] is None and gradients[2] is None  # constants
    assert clipped.tolist() == [c == 0 and a != 0 for c, a in zip(table, advantages, strict=True)]
    torch.testing.assert_close(ratio, torch.tensor(seen, dtype=torch.float64))
    assert not ratio.requires_grad


@settings(deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 1), st.floats(1, 3), st.none() | st.floats(1.01, 5))
def test_ppo_value_equals_the_formula_anywhere(log_ratio, advantage, low, high, dual_clip):
    logp, A = torch.tensor([log_ratio], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    loss, ratio, _ = ppo_clip_loss(logp, torch.zeros_like(logp), A, low, high, dual_clip)
    expected = -oracles.ppo_objective(ratio.item(), advantage, low, high, dual_clip)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_ppo_gradient_at_a_bound_is_the_whole_one():
    # torch.min shares the gradient of a tie; here the bound itself belongs to the inside.
    logp = torch.zeros(2, requires_grad=True)
    loss, _, clipped = ppo_clip_loss(logp, torch.zeros(2), torch.tensor([1.0, -1.0]), clip_low=1.0, clip_high=1.0)
    assert torch.autograd.grad(loss.sum(), logp)[0].tolist() == [-1.0, 1.0] and not clipped.any()


def test_ppo_on_policy_is_reinforce():
    logp = torch.tensor([-0.5, -3.0, -9.0], requires_grad=True)
    A = torch.tensor([1.0, -2.0, 0.5])
    ppo, plain = ppo_clip_loss(logp, logp.detach(), A)[0], reinforce_loss(logp, A)
    assert torch.equal(torch.autograd.grad(ppo.sum(), logp)[0], torch.autograd.grad(plain.sum(), logp)[0])


@pytest.mark.parametrize("gap", [50.0, 200.0, math.inf])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_ppo_has_no_nan_at_extreme_ratios_in_fp32(gap, dual_clip):
    logp = torch.tensor([-gap, -gap, -gap, 0.0, 0.0, 0.0], requires_grad=True)
    far = min(gap, 200.0)
    log_mu = torch.tensor([-1.0, -1.0, -1.0, -far, -far, -far])  # ratios near 0, then huge
    A = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0, -1.0])
    loss, _, clipped = ppo_clip_loss(logp, log_mu, A, dual_clip=dual_clip)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert not loss.isnan().any() and not gradient.isnan().any()
    assert clipped.tolist() == [False, False, True, True, False, dual_clip is not None]
    torch.testing.assert_close(gradient[:5], torch.tensor([-math.exp(1 - gap), 0.0, 0.0, 0.0, 0.0]), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(loss[:5], torch.tensor([-math.exp(1 - gap), 0.0, 0.8, -1.2, 0.0]), rtol=1e-5, atol=1e-30)
    if dual_clip is None:  # unbounded above, as documented
        assert loss[5] == gradient[5] == torch.tensor(far).exp()
    else:
        assert loss[5] == dual_clip and gradient[5] == 0


def test_a_loss_over_no_tokens_keeps_the_graph():
    logp, none = (torch.ones(2, requires_grad=True) * 1.0)[:0], torch.zeros(0)
    index = torch.zeros(0, dtype=torch.long)
    losses = [
        ppo_clip_loss(logp, none, none)[0],
        topr_loss(logp, none, none)[0],
        topr_loss(logp, none, none, level="sequence", rollout_index=index)[0],
        reinforce_loss(logp, none),
    ]
    assert all(len(loss) == 0 and loss.grad_fn is not None for loss in losses)


# ------------------------------------------------------------------------------------------------ TOPR


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.5, 2.0), (0.0, 0.0), (1.0, 1.0)])
def test_topr_gradient_equals_the_table_and_its_weights_are_constants(low, high):
    ratios, advantages = ([row[column] for row in GRID] for column in (0, 1))
    logp, log_mu = at(ratios)
    log_mu.requires_grad_()
    A = torch.tensor(advantages, dtype=torch.float64, requires_grad=True)
    loss, ratio = topr_loss(logp, log_mu, A, low, high)
    expected = [oracles.topr_coefficient(r, a, low, high) for r, a in zip(ratios, advantages, strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)
    gradients = torch.autograd.grad(loss.sum(), (logp, log_mu, A), allow_unused=True)
    # Were the weight differentiated too, an A<0 token inside the bounds would get an extra ρ·log π·A.
    torch.testing.assert_close(gradients[0], -expected, rtol=1e-12, atol=1e-12)
    assert gradients[1] is None and gradients[2] is None and not ratio.requires_grad
    torch.testing.assert_close(ratio, torch.tensor(ratios, dtype=torch.float64))


def test_topr_per_sequence_weighs_every_token_with_its_rollouts_product():
    ratios, index = [0.5, 0.9, 2.0, 0.1, 1.5, 1.5], torch.tensor([0, 0, 1, 1, 2, 2])
    advantages = [-1.0, -1.0, -2.0, -2.0, 3.0, 3.0]
    logp, log_mu = at(ratios)
    A = torch.tensor(advantages, dtype=torch.float64)
    loss, ratio = topr_loss(logp, log_mu, A, level="sequence", rollout_index=index)
    products = [0.45, 0.45, 0.2, 0.2, 2.25, 2.25]
    expected = [oracles.topr_coefficient(r, a, 0.0, 1.0) for r, a in zip(products, advantages, strict=True)]
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(gradient, -torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(ratio, torch.tensor(ratios, dtype=torch.float64))


def test_topr_is_finite_where_a_sequence_ratio_overflows():
    index = torch.zeros(100, dtype=torch.long)
    for gap in (-50.0, 50.0):
        logp = torch.full((100,), -60.0, requires_grad=True)
        loss, _ = topr_loss(logp, logp.detach() - gap, -torch.ones(100), level="sequence", rollout_index=index)
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        assert loss.isfinite().all() and gradient.unique().tolist() == [1.0 if gap > 0 else 0.0]
    impossible = torch.tensor([-math.inf, -math.inf], requires_grad=True)
    loss, _ = topr_loss(impossible, torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, 0.0]))
    assert loss.tolist() == [0.0, 0.0]


@given(st.floats(-4, 4), st.floats(-4, -0.01))
def test_topr_and_ppo_push_a_bad_token_equally_below_ratio_1_and_topr_no_further(log_ratio, advantage):
    logp = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    mu, A = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    topr = torch.autograd.grad(topr_loss(logp, mu, A)[0].sum(), logp)[0].item()
    ppo = torch.autograd.grad(ppo_clip_loss(logp, mu, A, clip_low=0.0)[0].sum(), logp)[0].item()
    assert topr == pytest.approx(min(ppo, -advantage), rel=1e-9)


# ------------------------------------------------------------------------------------------------ SNIS


def test_snis_weights_equal_the_softmax_of_each_group():
    generator = torch.Generator().manual_seed(0)
    student, mu, rewards = 5 * torch.randn(3, 7, generator=generator, dtype=torch.float64)
    groups = torch.tensor([4, 1, 4, 1, 1, 9, 4])
    weights = snis_weights(student.requires_grad_(), mu, rewards, 0.5, groups)
    assert not weights.requires_grad
    for number in (1, 4, 9):
        own = groups == number
        torch.testing.assert_close(weights[own], torch.softmax((student - mu + rewards / 0.5)[own].detach(), 0))
    expected = [1 / sum(w**2 for w in weights[groups == number].tolist()) for number in (1, 4, 9)]
    torch.testing.assert_close(effective_sample_size(weights, groups), torch.tensor(expected, dtype=torch.float64))


def test_snis_over_every_sequence_is_the_reward_tilted_student():
    # Each of the 27 sequences drawn once, so μ is uniform: the weights are then S·exp(R/β) itself, normalised.
    chain = oracles.MarkovChain.seeded(0)
    log_s = torch.stack([chain.logprob("student", chain.W, y) for y in chain.sequences()])
    rewards = torch.tensor([float(y[0] == y[-1]) for y in chain.sequences()], dtype=torch.float64)
    weights = snis_weights(log_s, torch.full_like(log_s, -math.log(27)), rewards, 0.25, torch.zeros(27, dtype=torch.long))
    tilted = log_s.exp() * (rewards / 0.25).exp()
    torch.testing.assert_close(weights, tilted / tilted.sum())


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.floats(0.01, 1e3))
def test_snis_weights_sum_to_1_and_the_effective_sample_size_lies_between_1_and_g(seed, size, scale):
    student, mu = scale * torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    groups = torch.zeros(size, dtype=torch.long)
    weights = snis_weights(student, mu, torch.zeros(size), 1.0, groups)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert 1 - 1e-5 <= effective_sample_size(weights, groups).item() <= size + 1e-4


def test_equal_rollouts_count_in_full():
    groups = torch.zeros(5, dtype=torch.long)
    weights = snis_weights(torch.zeros(5), torch.zeros(5), torch.ones(5), 0.1, groups)
    assert effective_sample_size(weights, groups).item() == pytest.approx(5.0)


# ------------------------------------------------------------------------------------------------ plain, and refusals


def test_reinforce_gradient_is_the_advantage_and_0_where_the_advantage_is_0():
    logp = torch.tensor([-1.0, -2.0, -math.inf], requires_grad=True)
    A = torch.tensor([3.0, -4.0, 0.0], requires_grad=True)
    loss = reinforce_loss(logp, A)
    assert loss.tolist() == [3.0, -8.0, 0.0]
    gradients = torch.autograd.grad(loss.sum(), (logp, A), allow_unused=True)
    assert gradients[0].tolist() == [-3.0, 4.0, 0.0] and gradients[1] is None


def test_refusals_say_what_is_wrong():
    x, groups = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    for low, high in ((0.2, 0.2), (1.2, 1.4), (-0.2, 1.2)):
        with pytest.raises(ValueError, match=r"bounds multiply the ratio"):
            ppo_clip_loss(x, x, x, low, high)
    with pytest.raises(ValueError, match=r"dual_clip=0.9 must be above 1"):
        ppo_clip_loss(x, x, x, dual_clip=0.9)
    with pytest.raises(ValueError, match=r"topr_low=2"):
        topr_loss(x, x, x, low=2.0)
    with pytest.raises(ValueError, match=r"topr_level=sequence"):
        topr_loss(x, x, x, level="sequence")
    with pytest.raises(ValueError, match=r"topr_level=turn"):
        topr_loss(x, x, x, level="turn")
    with pytest.raises(ValueError, match=r"beta=0.0 must be above 0"):
        snis_weights(x, x, x, 0.0, groups)
