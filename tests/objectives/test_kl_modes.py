"""Test the exact expected gradient of every `kl_mode`, over all pairs of sequences of a chain.

The pieces are held to the estimator table in tests/losses/test_estimators.py; here the objective's own path is: behaviour pass,
group advantages with a baseline, ratio, loss. Two rollouts a group, all 27 × 27 pairs weighed by their probability.
"""

from dataclasses import replace

import pytest
import torch

from pidistill.objectives import OPSD, PiDistill
from tests.support.objective_runs import expected_gradient, pathwise_gradient
from tests.support.oracles import MarkovChain

BETA = 0.7


def build(sampler: str, kl_mode: str, **kwargs):
    if sampler == "teacher":
        return PiDistill(alpha=1.0, beta=BETA, kl_mode=kl_mode, **kwargs)
    return OPSD(beta=BETA, kl_mode=kl_mode, **kwargs)


@pytest.mark.parametrize("sampler", ["teacher", "student"])
@pytest.mark.parametrize("seed", [0, 1])
def test_unbiased_modes_have_the_gradient_of_the_sequence_kl(sampler, seed):
    """reward_k1 with a leave-one-out baseline and loss_rb_complete: β·∇KL(P||sg Q), exactly."""
    chain = MarkovChain.seeded(seed, sampler=sampler)
    expected = BETA * chain.true_gradient()
    for objective in (build(sampler, "reward_k1", advantage="leave_one_out"), build(sampler, "loss_rb_complete")):
        torch.testing.assert_close(expected_gradient(objective, chain), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["teacher", "student"])
def test_the_group_mean_that_includes_the_rollout_scales_a_reward_mode(sampler):
    """With G=2 the expected gradient is (G−1)/G = half of the true one."""
    chain = MarkovChain.seeded(0, sampler=sampler)
    objective = build(sampler, "reward_k1", advantage="group_mean")
    torch.testing.assert_close(expected_gradient(objective, chain), 0.5 * BETA * chain.true_gradient(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["teacher", "student"])
@pytest.mark.parametrize(
    "mode", [{"kl_mode": "loss_rb"}, {"kl_mode": "loss_k2"}, {"kl_mode": "loss_rb_complete", "kl_gamma": 0.0}]
)
def test_loss_modes_have_the_pathwise_gradient(sampler, mode):
    chain = MarkovChain.seeded(0, sampler=sampler)
    ours = expected_gradient(build(sampler, **mode), chain)
    torch.testing.assert_close(ours, BETA * pathwise_gradient(chain), atol=2e-6, rtol=1e-5)


def lagging(seed: int, sampler: str) -> tuple[MarkovChain, MarkovChain]:
    """Return a chain, and the one whose weights sampled: about an update away from it."""
    chain = MarkovChain.seeded(seed, sampler=sampler)
    return chain, replace(chain, W=chain.W + 0.1 * torch.randn_like(chain.W))


@pytest.mark.parametrize("sampler", ["teacher", "student"])
def test_on_older_samples_whole_rollouts_weights_make_reward_k1_exact_and_loss_rb_complete_not(sampler):
    """The weights reach the policy gradient, and no KL that is a loss: its prefixes stay those of the older policy."""
    chain, older = lagging(0, sampler)
    expected = BETA * chain.true_gradient()
    k1 = build(sampler, "reward_k1", advantage="leave_one_out")
    torch.testing.assert_close(expected_gradient(k1, chain, older, weighed=True), expected, atol=2e-6, rtol=1e-5)
    for objective, weighed in ((k1, False), (build(sampler, "loss_rb_complete"), True)):
        error = (expected_gradient(objective, chain, older, weighed) - expected).norm() / expected.norm()
        assert error > 0.01, error


@pytest.mark.parametrize("sampler", ["teacher", "student"])
def test_on_older_samples_loss_rb_has_the_pathwise_gradient_at_their_prefixes_and_loss_k2_has_not(sampler):
    chain, older = lagging(1, sampler)
    expected = BETA * pathwise_gradient(chain, prefixes=older)
    torch.testing.assert_close(expected_gradient(build(sampler, "loss_rb"), chain, older), expected, atol=2e-6, rtol=1e-5)
    error = (expected_gradient(build(sampler, "loss_k2"), chain, older) - expected).norm() / expected.norm()
    assert error > 0.05, error


def test_reward_rb_is_not_a_gradient_of_the_kl():
    """Compute what the paper's text describes: on this chain the cosine to the true gradient is −0.33."""
    chain = MarkovChain.seeded(0)
    ours = expected_gradient(build("teacher", "reward_rb", advantage="leave_one_out"), chain)
    cosine = torch.cosine_similarity(ours.flatten(), chain.true_gradient().flatten(), dim=0)
    assert cosine.item() == pytest.approx(-0.33, abs=0.005)


@pytest.mark.parametrize("kl_mode", ["loss_rb", "reward_k1"])
def test_the_student_half_has_the_gradient_of_its_kl(kl_mode):
    """J_S's −β·kl(sg T||S) with y ~ T: teacher-forced cross-entropy, the pathwise term only, whatever the teacher half does."""
    chain = MarkovChain.seeded(0, live="student")
    ours = expected_gradient(PiDistill(alpha=0.0, beta=BETA, kl_mode=kl_mode), chain)
    torch.testing.assert_close(ours, BETA * chain.gradient(chain.sequence_kl), atol=2e-6, rtol=1e-5)
