"""Test which expressions are a gradient of the sequence KL, by enumerating every sequence of a small chain."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pidistill.losses.divergences import divergence, kl
from pidistill.losses.estimators import complete_kl_advantages, k1, k2, k3, kl_to_go, leave_one_out_kl_to_go_baseline
from pidistill.losses.policy_gradient import reinforce_loss
from pidistill.losses.reductions import sum_by_rollout
from pidistill.types import Divergence
from tests.support import oracles
from tests.support.oracles import ChainTokens, MarkovChain, cosine_and_norm_ratio

SEEDS = range(8)
# (sampler, a token that ends the sequence): π-Distill's view and OPSD's, fixed and varying length
CHAINS = [("teacher", None), ("student", None), ("teacher", 2), ("student", 0)]


def summed(tokens: ChainTokens, per_token: torch.Tensor) -> torch.Tensor:
    """[N] each token's rollout total."""
    return sum_by_rollout(per_token, tokens.rollout_index, len(tokens.lengths))[tokens.rollout_index]


def score_function(tokens: ChainTokens, cost: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is cost·∇log p(y)."""
    return reinforce_loss(tokens.p, -cost)


# Each row: the loss per token whose expected gradient is compared with the true one.
def reward_k1(tokens: ChainTokens) -> torch.Tensor:
    return score_function(tokens, summed(tokens, k1(tokens.p, tokens.q)))


def reward_rb(tokens: ChainTokens) -> torch.Tensor:
    return score_function(tokens, summed(tokens, kl(tokens.p_full, tokens.q_full)))


def loss_rb(tokens: ChainTokens) -> torch.Tensor:
    return kl(tokens.p_full, tokens.q_full)


def loss_rb_complete(tokens: ChainTokens, gamma: float = 1.0) -> torch.Tensor:
    k = loss_rb(tokens)
    # Groups of one: no baseline; the baseline has its own test below.
    to_go = complete_kl_advantages(list(k.detach().split(tokens.lengths)), list(range(len(tokens.lengths))), gamma)
    return k + score_function(tokens, torch.cat(to_go))


def advantage_rb(tokens: ChainTokens) -> torch.Tensor:
    return score_function(tokens, kl(tokens.p_full, tokens.q_full))


def loss_k1(tokens: ChainTokens) -> torch.Tensor:
    return k1(tokens.p, tokens.q)


def loss_k2(tokens: ChainTokens) -> torch.Tensor:
    return k2(tokens.p, tokens.q)


def loss_k3(tokens: ChainTokens) -> torch.Tensor:
    return k3(tokens.p, tokens.q)


def row(estimator, seed: int, sampler: str = "teacher", end: int | None = None) -> tuple[float, float]:
    chain = MarkovChain.seeded(seed, sampler, end=end)
    return cosine_and_norm_ratio(chain.expected_gradient(estimator), chain.true_gradient())


# --------------------------------------------------------------------------------- the table of modes and their gradients


@pytest.mark.parametrize(("sampler", "end"), CHAINS)
@pytest.mark.parametrize("estimator", [reward_k1, loss_rb_complete])
def test_unbiased_estimators_equal_the_true_gradient_on_every_chain(estimator, sampler, end):
    for seed in SEEDS:
        cosine, norm_ratio = row(estimator, seed, sampler, end)
        assert cosine == pytest.approx(1.0, abs=1e-10) and norm_ratio == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize(("sampler", "end"), CHAINS)
@pytest.mark.parametrize("estimator", [advantage_rb, loss_k1])
def test_estimators_without_signal_have_zero_expected_gradient_on_every_chain(estimator, sampler, end):
    for seed in SEEDS:
        assert row(estimator, seed, sampler, end)[1] < 1e-10


def test_the_two_rows_that_depend_on_the_chain_are_as_printed_for_seed_0():
    cosine, norm_ratio = row(reward_rb, 0)
    assert f"{cosine:.2f} {norm_ratio:.2f}" == "-0.33 0.13"
    cosine, norm_ratio = row(loss_rb, 0)
    assert f"{cosine:.4f} {norm_ratio:.2f}" == "0.9933 1.05"


def test_the_two_rows_that_depend_on_the_chain_have_the_printed_ranges_over_8_seeds():
    in_reward, as_loss = ([row(estimator, seed)[0] for seed in SEEDS] for estimator in (reward_rb, loss_rb))
    assert f"{min(in_reward):.2f} {max(in_reward):.2f}" == "-0.35 0.62"
    assert f"{min(as_loss):.2f} {max(as_loss):.2f}" == "0.82 1.00"


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("sampler", ["teacher", "student"])
def test_the_expected_values_of_k1_k3_and_the_rb_sum_are_the_sequence_kl_and_that_of_k2_is_not(sampler):
    chain = MarkovChain.seeded(0, sampler)
    tokens = chain.tokens(chain.W)
    truth = chain.sequence_kl(chain.W)
    for estimator in (loss_k1, loss_k3, loss_rb):
        value = (tokens.probability * sum_by_rollout(estimator(tokens), tokens.rollout_index, len(tokens.lengths))).sum()
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    biased = (tokens.probability * sum_by_rollout(loss_k2(tokens), tokens.rollout_index, len(tokens.lengths))).sum()
    assert abs(biased - truth) > 0.1 * truth


@given(st.integers(0, 2**31))
def test_k2_and_k3_are_never_negative(seed):
    logp, logq = torch.randn(2, 20, generator=torch.Generator().manual_seed(seed)).mul(5)
    assert (k2(logp, logq) >= 0).all() and (k3(logp, logq) >= 0).all()


# ------------------------------------------------------------------------------------------------ gradients per docstring


@pytest.mark.parametrize(("sampler", "end"), CHAINS)
def test_through_p_k2_follows_the_rb_loss_and_k3_follows_the_other_kl(sampler, end):
    for seed in SEEDS:
        chain = MarkovChain.seeded(seed, sampler, end=end)
        torch.testing.assert_close(chain.expected_gradient(loss_k2), chain.expected_gradient(loss_rb), rtol=0, atol=1e-12)
        reverse = chain.expected_gradient(lambda tokens: kl(tokens.q_full, tokens.p_full))
        torch.testing.assert_close(chain.expected_gradient(loss_k3), reverse, rtol=0, atol=1e-12)
    assert not torch.allclose(reverse, chain.expected_gradient(loss_rb), atol=1e-2)


@pytest.mark.parametrize(("sampler", "end"), CHAINS)
def test_through_q_the_rb_loss_k1_and_k3_are_the_whole_gradient_and_k2_is_not(sampler, end):
    # y ~ sg p, gradient through q: the student half of π-Distill where the teacher samples.
    for seed in SEEDS:
        live = "student" if sampler == "teacher" else "teacher"
        chain = MarkovChain.seeded(seed, sampler, live=live, end=end)
        truth = chain.true_gradient()
        assert truth.norm() > 1e-2
        for estimator in (loss_rb, loss_k1, loss_k3):
            torch.testing.assert_close(chain.expected_gradient(estimator), truth, rtol=0, atol=1e-12)
        assert not torch.allclose(chain.expected_gradient(loss_k2), truth, atol=1e-2)


@pytest.mark.parametrize("live", ["teacher", "student"])
@pytest.mark.parametrize("sampler", ["teacher", "student"])
@pytest.mark.parametrize(("name", "beta"), [("kl_teacher_student", None), ("kl_student_teacher", None), ("jsd", 0.3)])
def test_every_divergence_as_a_loss_has_the_gradient_of_its_sum_over_visited_prefixes(sampler, live, name, beta):
    # The self-distillation family: y ~ sg sampler, gradient through one view only.
    chain = MarkovChain.seeded(0, sampler, live=live)

    def loss(tokens: ChainTokens, grad: str) -> torch.Tensor:
        full = {chain.sampler: tokens.p_full, chain.other: tokens.q_full}
        return divergence(Divergence(name, grad=grad, beta=beta), full["teacher"], full["student"])

    def at_prefix(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if name == "jsd":
            return oracles.jsd(t, s, beta)
        return oracles.kl(t, s) if name == "kl_teacher_student" else oracles.kl(s, t)

    def expected_sum(W: torch.Tensor) -> torch.Tensor:
        teacher, student = chain.logits("teacher", W), chain.logits("student", W)
        return sum(
            torch.exp(chain.logprob(chain.sampler, chain.W, y))
            * sum(at_prefix(teacher[prev], student[prev]) for prev in chain.previous(y))
            for y in chain.sequences()
        )

    got = chain.expected_gradient(lambda tokens: loss(tokens, live))
    torch.testing.assert_close(got, chain.gradient(expected_sum), rtol=1e-10, atol=1e-12)
    frozen = "student" if live == "teacher" else "teacher"
    assert not loss(chain.tokens(chain.W.clone().requires_grad_()), frozen).requires_grad


# ------------------------------------------------------------------------------------------------ KL to go

rounds = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.floats(0, 3), max_size=7), min_size=n, max_size=n),
        st.lists(st.integers(0, 2), min_size=n, max_size=n),
        st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    )
)


def as_tensors(kls: list[list[float]]) -> list[torch.Tensor]:
    return [torch.tensor(k, dtype=torch.float64) for k in kls]


@settings(deadline=None)
@given(rounds)
def test_complete_kl_advantages_equal_the_loop(case):
    kls, groups, gamma = case
    got = complete_kl_advantages(as_tensors(kls), groups, gamma)
    for own, expected in zip(got, as_tensors(oracles.complete_kl_advantages(kls, groups, gamma)), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


@settings(deadline=None)
@given(rounds)
def test_kl_to_go_equals_the_loop_and_never_crosses_rollouts(case):
    kls, _, gamma = case
    index = torch.arange(len(kls)).repeat_interleave(torch.tensor([len(k) for k in kls]))
    got = kl_to_go(torch.cat(as_tensors(kls)), index, gamma)
    expected = torch.cat(as_tensors([oracles.kl_to_go(k, gamma) for k in kls]))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_kl_to_go_of_a_long_rollout_is_accurate_and_detached():
    k = torch.full((3000,), 0.1).requires_grad_()
    got = kl_to_go(k, torch.zeros(3000, dtype=torch.long), 1.0)
    assert not got.requires_grad
    torch.testing.assert_close(got, 0.1 * torch.arange(2999, -1, -1), rtol=1e-5, atol=1e-5)


def test_gamma_0_is_loss_rb():
    chain = MarkovChain.seeded(0)
    got = chain.expected_gradient(lambda tokens: loss_rb_complete(tokens, gamma=0.0))
    assert torch.equal(got, chain.expected_gradient(loss_rb))
    assert all((x == 0).all() for x in complete_kl_advantages(as_tensors([[1.0, 2.0], [3.0]]), [0, 0], 0.0))


def test_gamma_between_moves_from_loss_rb_to_the_whole_gradient():
    chain = MarkovChain.seeded(1)
    truth = chain.true_gradient()
    errors = [
        (chain.expected_gradient(lambda tokens, g=gamma: loss_rb_complete(tokens, g)) - truth).norm().item()
        for gamma in (0.0, 0.5, 0.9, 1.0)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12 < errors[-2]


def test_siblings_of_equal_kl_to_go_leave_nothing_and_a_shorter_one_counts_as_0():
    same = complete_kl_advantages(as_tensors([[0.3, 0.2, 0.1]] * 3), [7, 7, 7])
    assert all(x.abs().max() < 1e-15 for x in same)
    long, short = complete_kl_advantages(as_tensors([[1.0, 1.0, 1.0], [5.0]]), [0, 0])
    assert long.tolist() == [2.0, 1.0, 0.0] and short.tolist() == [-2.0]
    empty, other = complete_kl_advantages(as_tensors([[], [1.0, 4.0]]), [0, 0])
    assert empty.tolist() == [] and other.tolist() == [4.0, 0.0]
    assert complete_kl_advantages([], []) == []
    assert len(kl_to_go(torch.zeros(0), torch.zeros(0, dtype=torch.long))) == 0


@pytest.mark.parametrize(("sampler", "end"), CHAINS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_leave_one_out_baseline_keeps_the_expected_gradient_exactly(seed, sampler, end):
    # Every pair of sequences is a group of two, weighted with its probability: an exact expectation over groups.
    chain = MarkovChain.seeded(seed, sampler, end=end)
    sequences = chain.sequences()
    pairs = list(itertools.product(range(len(sequences)), repeat=2))
    flat = [sequences[i] for pair in pairs for i in pair]
    groups = [g for g in range(len(pairs)) for _ in range(2)]

    def expectation(W, with_baseline=True):
        tokens = chain.tokens(W, flat)
        k = loss_rb(tokens)
        numbers = groups if with_baseline else list(range(len(flat)))
        to_go = torch.cat(complete_kl_advantages(list(k.detach().split(tokens.lengths)), numbers, 1.0))
        per_rollout = sum_by_rollout(k + score_function(tokens, to_go), tokens.rollout_index, len(flat))
        both = per_rollout.view(-1, 2)
        weight = tokens.probability.view(-1, 2).prod(1)
        return (weight * both.mean(1)).sum()

    torch.testing.assert_close(chain.gradient(expectation), chain.true_gradient(), rtol=0, atol=1e-12)
    # The baseline does something: without it the per-token coefficients are others.
    kls = [loss_rb(chain.tokens(chain.W, [y])) for y in (sequences[0], sequences[-1])]
    assert not torch.allclose(
        torch.cat(complete_kl_advantages(kls, [0, 0])), torch.cat(complete_kl_advantages(kls, [0, 1])), atol=1e-3
    )


def test_the_flat_baseline_takes_rollouts_in_any_group_order():
    to_go = torch.tensor([2.0, 1.0, 5.0, 4.0, 3.0])
    index, position = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 0, 0, 1])
    got = leave_one_out_kl_to_go_baseline(to_go, index, position, torch.tensor([9, 4, 9]))
    assert got.tolist() == [4.0, 3.0, 0.0, 2.0, 1.0]


def test_refusals_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"kl_gamma=1.5"):
        kl_to_go(torch.zeros(2), torch.zeros(2, dtype=torch.long), 1.5)
    with pytest.raises(ValueError, match=r"more than one stretch"):
        kl_to_go(torch.zeros(3), torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"2 rollouts with a KL but 1 group"):
        complete_kl_advantages([torch.zeros(1), torch.zeros(2)], [0])
