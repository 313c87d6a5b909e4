"""Test the exact expected gradient of every `kl_mode`, over all pairs of sequences of a chain.

The pieces are held to the estimator table in tests/losses/test_estimators.py; here the objective's own path is: behaviour pass,
group advantages with a baseline, ratio, loss. Two rollouts a group, all 27 × 27 pairs weighed by their probability.
"""

from dataclasses import replace

import pytest
import torch

from pidistill.objectives import OPSD, PiDistill
from pidistill.types import Example, PromptPair, Rollout, Scores
from tests.support import oracles
from tests.support.objective_runs import exact_batch, expected_gradient, pathwise_gradient
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
@pytest.mark.parametrize("advantage", ["group_mean", "standardised"])
def test_the_group_mean_that_includes_the_rollout_scales_a_reward_mode(sampler, advantage):
    """With G=2 the expected gradient is (G−1)/G = half of the true one; `standardised` divides the reward, not the KL."""
    chain = MarkovChain.seeded(0, sampler=sampler)
    objective = build(sampler, "reward_k1", advantage=advantage)
    torch.testing.assert_close(expected_gradient(objective, chain), 0.5 * BETA * chain.true_gradient(), atol=2e-6, rtol=1e-5)


KLS = [0.3, -0.2, 0.9, 0.4, 1.5, 0.1, 0.6]  # nats per token; a negative one is a sampled log-ratio
GROUPS = [0, 1, 0, 0, 1, 0, 1]
TOLD = [True, True, False, True, True, True, False]
TOLD_LATE = 3  # the row whose first token has no privileged information: an observation after it brings some


def partly_told_rollouts(rewards):
    """Rollouts of 3 + i policy tokens, a KL that grows along each of them, and privileged information for some of them."""
    rollouts = []
    for i, (reward, kl, group, told) in enumerate(zip(rewards, KLS, GROUPS, TOLD, strict=True)):
        told = told and i != TOLD_LATE
        rollouts.append(
            Rollout(
                example=Example(id=f"row {i}", messages=[], privileged="pi"),
                prompts=PromptPair([1], [2, 1] if told else [1], has_privileged=told),
                completion=[5] * (4 + i),
                policy_mask=[True, False] + [True] * (2 + i),
                sampled_logprobs=[-1.0] * (4 + i),
                sampled_by="student",
                group=group,
                stop_reason="done",
                turns=[],
                reward=reward,
                teacher_reads=[(1, 2, [7, 5])] if i == TOLD_LATE else [],
                behaviour_values=[kl * (t + 1) for t in range(3 + i)],
            )
        )
    return rollouts


def distilled_kls(rollouts, no_pi="rl"):
    """The KL of each token, without that of the one token of a told rollout that has no privileged information."""
    return [
        [0.0 if (i, t, no_pi) == (TOLD_LATE, 0, "rl") else x for t, x in enumerate(r.behaviour_values)]
        for i, r in enumerate(rollouts)
    ]


@pytest.mark.parametrize("scale", ["sum", "token_mean"])
@pytest.mark.parametrize("no_pi", ["rl", "distill"])
@pytest.mark.parametrize("advantage", ["group_mean", "leave_one_out", "standardised"])
@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.25, 0.0, 1.0, 1.0, 0.5], [0.5] * 7], ids=["several rewards", "equal rewards"])
def test_a_kl_in_the_reward_is_compared_undivided_among_the_distilled_rollouts_of_the_group(rewards, advantage, no_pi, scale):
    rollouts = partly_told_rollouts(rewards)
    told = [no_pi == "distill" or has for has in TOLD]
    totals = [sum(kls) / (len(kls) if scale == "token_mean" else 1) for kls in distilled_kls(rollouts, no_pi)]
    for beta in (0.25, 10.0):
        objective = OPSD(beta=beta, kl_mode="reward_rb", kl_reward_scale=scale, advantage=advantage, no_pi=no_pi)
        for i, answer in enumerate(objective.advantages(rollouts, 0)):
            assert answer.advantage == pytest.approx(oracles.advantages(advantage, rewards, GROUPS)[i], abs=1e-6)
            own = [x for x, group, counts in zip(totals, GROUPS, told, strict=True) if group == GROUPS[i] and counts]
            gap = totals[i] - sum(own) / len(own) if told[i] else 0.0
            size = len(own) / (len(own) - 1) if advantage == "leave_one_out" else 1.0
            assert answer.kl == pytest.approx([-beta * gap * size] * rollouts[i].policy_tokens, rel=1e-5, abs=1e-5)


def test_reward_weight_scales_a_standardised_advantage_and_not_the_kl_beside_it():
    """Where the ratio is 1, −loss is the advantage."""
    rewards = [1.0, 0.0, 0.25, 0.0, 1.0, 1.0, 0.5]
    objective = OPSD(beta=BETA, kl_mode="reward_k1", advantage="standardised", reward_weight=0.5)
    rollouts = partly_told_rollouts(rewards)
    batch = exact_batch(rollouts, objective.advantages(rollouts, 0))
    batch.ratio_logprobs = torch.full_like(batch.ratio_logprobs[: len(batch.targets)], -1.0)
    scores = Scores(batch.ratio_logprobs.clone(), batch.ratio_logprobs.clone(), {}, None, None)
    expected = 0.5 * batch.advantages + batch.kl_advantages
    torch.testing.assert_close(-objective.token_loss(batch, scores, 0).loss, expected)
    assert batch.kl_advantages.any()


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_the_future_kl_is_compared_among_the_rollouts_with_privileged_information(gamma):
    rollouts = partly_told_rollouts([0.0] * 7)
    places = [i for i, told in enumerate(TOLD) if told]
    kls, groups = [distilled_kls(rollouts)[i] for i in places], [GROUPS[i] for i in places]
    expected = dict(zip(places, oracles.complete_kl_advantages(kls, groups, gamma), strict=True))
    answers = OPSD(beta=BETA, kl_mode="loss_rb_complete", kl_gamma=gamma).advantages(rollouts, 0)
    for i, answer in enumerate(answers):
        values = expected.get(i, [0.0] * rollouts[i].policy_tokens)
        assert answer.kl == pytest.approx([-BETA * value for value in values], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kl_mode", ["reward_k1", "reward_rb", "loss_rb_complete"])
def test_a_round_without_any_privileged_information_has_no_kl_advantage(kl_mode):
    untold = {"prompts": PromptPair([1], [1], has_privileged=False), "teacher_reads": [], "behaviour_values": None}
    rollouts = [replace(r, **untold) for r in partly_told_rollouts([0.0] * 7)]
    answers = OPSD(kl_mode=kl_mode).advantages(rollouts, 0)
    assert [answer.kl for answer in answers] == [[0.0] * r.policy_tokens for r in rollouts]


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
