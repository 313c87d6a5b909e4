"""A constant advantage: no expected gradient over all tokens, the gradient of a tail's mass on a tail."""

import math
from dataclasses import replace

import pytest
import torch

from pidistill.errors import InputError
from pidistill.objectives import ConstantNegative
from pidistill.types import Scores
from tests.support.builders import batch_of, random_rollouts
from tests.support.objective_runs import expected_gradient
from tests.support.oracles import MarkovChain


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("end", [None, 1])
def test_over_all_tokens_the_expected_gradient_is_zero(seed, end):
    chain = MarkovChain.seeded(seed, sampler="student", end=end)
    gradient = expected_gradient(ConstantNegative(quantile=1.0, entropy_scaled=False), chain)
    assert gradient.abs().max() < 1e-10


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_on_a_tail_it_is_the_gradient_of_the_tails_mass(seed, value):
    """The tail is the tokens of each prefix whose log-prob is at most that of the last selected token, held fixed."""
    chain, quantile = MarkovChain.seeded(seed, sampler="student"), 0.2
    ours = expected_gradient(ConstantNegative(quantile=quantile, value=value, entropy_scaled=False), chain)
    logp = torch.log_softmax(chain.W, -1)
    of_round = sorted(float(logp[p, t]) for y in chain.sequences() for p, t in zip(chain.previous(y), y, strict=True))
    tail = logp <= of_round[math.ceil(quantile * len(of_round)) - 1]

    def mass(W):
        probabilities = torch.softmax(W, -1)
        return sum(
            chain.logprob("student", chain.W, y).exp() * probabilities[p][tail[p]].sum()
            for y in chain.sequences()
            for p in chain.previous(y)
        )

    expected = -value * chain.gradient(mass)  # of the loss, which is −J
    assert expected.norm() > 1e-3
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-9)


def sampled(count: int = 6, seed: int = 0):
    return [replace(r, sampled_by="student") for r in random_rollouts(count, seed)]


def scaled_by_hand(rollouts, entropies, quantile):
    tokens = [
        (r, x)
        for r, rollout in enumerate(rollouts)
        for x, m in zip(rollout.sampled_logprobs, rollout.policy_mask, strict=True)
        if m
    ]
    last = sorted(x for _, x in tokens)[math.ceil(quantile * len(tokens)) - 1]
    chosen = [h for (_, x), h in zip(tokens, entropies, strict=True) if x <= last]
    low, high = min(chosen), max(chosen)
    values = [
        -(0.5 + (h - low) / (2 * (high - low))) if x <= last else 0.0 for (_, x), h in zip(tokens, entropies, strict=True)
    ]
    return values, len(chosen) / len(tokens)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 1.0])
def test_advantages_equal_the_published_scaling_and_select_the_share_that_is_asked_for(quantile):
    rollouts, objective = sampled(), ConstantNegative(quantile=quantile)
    count = sum(r.policy_tokens for r in rollouts)
    entropies = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for rollout, values in zip(rollouts, entropies.split([r.policy_tokens for r in rollouts]), strict=True):
        rollout.behaviour_values = values.tolist()
    advantages = objective.advantages(rollouts, 0)
    ours = [x for advantage in advantages for x in advantage.tokens]
    expected, share = scaled_by_hand(rollouts, entropies.tolist(), quantile)
    assert ours == pytest.approx(expected, abs=1e-12)
    assert quantile <= share < quantile + 1 / count
    assert min(ours) == -1.0 and all(x == 0.0 or -1.0 <= x <= -0.5 for x in ours)


def test_neither_rewards_nor_privileged_information_change_a_bit():
    objective, losses = ConstantNegative(entropy_scaled=False), []
    for with_pi, reward in ((True, 1.0), (False, 0.0), (True, None)):
        rollouts = [replace(r, reward=reward, task_reward=reward) for r in sampled()]
        if not with_pi:
            rollouts = [replace(r, prompts=replace(r.prompts, teacher=r.prompts.student)) for r in rollouts]
        batch = batch_of(rollouts, objective.advantages(rollouts, 0))
        logprobs = batch.ratio_logprobs + 0.01
        losses.append(objective.token_loss(batch, Scores(logprobs, None, {}, None, None), 0).loss)
    assert objective.score_request(0).views == ("student",)
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2]) and losses[0].abs().sum() > 0


def test_no_rollout_gives_no_advantage():
    assert ConstantNegative().advantages([], 0) == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantile": 0.0}, r"objective.quantile=0.0 must lie in \(0, 1\]"),
        ({"value": 0.0}, "objective.value=0.0 must be a finite"),
    ],
)
def test_settings_that_train_nothing_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        ConstantNegative(**settings)
