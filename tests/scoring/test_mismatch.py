"""Test the sampler against the trainer: what is measured, where a run stops, and the truncated importance weights."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.losses.policy_gradient import importance_weighted, ppo_clip_loss
from pidistill.objectives import GRPO, OPD, OPDPPO, OPSD, PiDistill
from pidistill.rollouts import TorchtuneSampler
from pidistill.scoring.mismatch import (
    DEFAULT_LIMIT_NATS,
    MismatchMeter,
    TruncatedImportanceWeights,
    logprobs_of_both,
    truncated_weights,
)
from pidistill.scoring.score import score
from pidistill.types import RolloutAdvantage, ScoreRequest
from tests.support.builders import CPU, batch_of, model, random_rollouts
from tests.support.oracles import ppo_coefficient

BOTH_VIEWS = ScoreRequest(student_grad=False, teacher_grad=False, entropy=False)


def recorded(rollout) -> list[float]:
    return [x for x, policy in zip(rollout.sampled_logprobs, rollout.policy_mask, strict=True) if policy]


def slow_weights(trainer: list[list[float]], sampler: list[list[float]], level: str, cap: float) -> list[list[float]]:
    """min(π/μ, cap) in Python's floats; ratios of a sequence are multiplied one by one."""
    result = []
    for ours, theirs in zip(trainer, sampler, strict=True):
        ratios = [math.exp(a - b) for a, b in zip(ours, theirs, strict=True)]
        weights = ratios if level == "token" else [math.prod(ratios)] * len(ratios)
        result.append([min(w, cap) for w in weights])
    return result


def flat(rows) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


# ------------------------------------------------------------------------------------------- weights


@given(
    level=st.sampled_from(["token", "sequence"]),
    cap=st.floats(1.0, 5.0),
    gaps=st.lists(st.lists(st.floats(-2.0, 2.0), max_size=5), min_size=1, max_size=4),
)
def test_weights_equal_the_slow_ones(level, cap, gaps):
    trainer = [[-3.0 + gap for gap in row] for row in gaps]
    sampler = [[-3.0] * len(row) for row in gaps]
    index = torch.tensor([i for i, row in enumerate(gaps) for _ in row], dtype=torch.long)
    weights, cut = truncated_weights(flat(trainer), flat(sampler), index, level, cap)
    expected = flat(slow_weights(trainer, sampler, level, cap))
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=0)
    assert not cut[expected < cap * (1 - 1e-9)].any()
    assert torch.equal(cut, flat(slow_weights(trainer, sampler, level, math.inf)) > cap) or (expected - cap).abs().min() < 1e-9


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_are_exactly_1_where_sampler_and_trainer_agree(level):
    logprobs = -torch.rand(7) * 30
    weights, cut = truncated_weights(logprobs, logprobs.clone(), torch.tensor([0, 0, 0, 1, 1, 3, 3]), level, 1.0)
    assert torch.equal(weights, torch.ones(7)) and not cut.any()


def test_a_product_that_overflows_is_the_cap_and_an_impossible_token_weighs_nothing():
    trainer, sampler = torch.tensor([0.0, 0.0, -torch.inf]), torch.tensor([-80.0, -80.0, -1.0])
    index = torch.tensor([0, 0, 1])
    for level in ("token", "sequence"):
        weights, cut = truncated_weights(trainer, sampler, index, level, 2.0)
        assert weights[:2].tolist() == pytest.approx([2.0, 2.0]) and cut.tolist() == [True, True, False]
        assert weights[2] == 0


def test_the_weighted_loss_has_the_weighted_gradient_and_the_weights_get_none():
    ratios, advantages = torch.tensor([0.5, 0.9, 1.1, 1.5, 3.0, 0.5]), torch.tensor([1.0, -2.0, 0.5, 1.0, -1.0, -1.0])
    weights = torch.tensor([2.0, 0.3, 1.0, 1.7, 0.0, 1.2], requires_grad=True)
    old = torch.full((6,), -1.7)
    logprobs = (old + ratios.log()).requires_grad_()
    loss, _, _ = ppo_clip_loss(logprobs, old, advantages)
    importance_weighted(loss, weights).sum().backward()
    pairs = zip(weights.tolist(), ratios.tolist(), advantages.tolist(), strict=True)
    # The oracle's coefficient is of ∇log π in J, advantage included.
    expected = [-w * ppo_coefficient(r, a, 0.8, 1.2, None) for w, r, a in pairs]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-5)
    assert weights.grad is None
    assert importance_weighted(loss, None) is loss


def test_over_all_tokens_the_weights_turn_the_samplers_gradient_into_the_trainers():
    """Σ_y μ(y)·w(y)·∇loss(y) = Σ_y π(y)·∇loss(y), the policy gradient, where the cap cuts nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    sampler = torch.log_softmax(logits.detach() + 0.3 * torch.randn(6, generator=generator, dtype=torch.float64), 0)
    rewards = torch.randn(6, generator=generator, dtype=torch.float64)
    policy = torch.log_softmax(logits, 0)
    (truth,) = torch.autograd.grad(-(policy.exp() * rewards).sum(), logits, retain_graph=True)
    weights, _ = truncated_weights(policy, sampler, torch.arange(6), "token", 100.0)
    loss, _, _ = ppo_clip_loss(policy, policy.detach(), rewards)
    (corrected,) = torch.autograd.grad((sampler.exp() * importance_weighted(loss, weights)).sum(), logits, retain_graph=True)
    (ignored,) = torch.autograd.grad((sampler.exp() * loss).sum(), logits)
    torch.testing.assert_close(corrected, truth, rtol=1e-9, atol=1e-12)
    assert (ignored - truth).norm() > 0.05 * truth.norm(), "the law would hold without weights"


# ------------------------------------------------------------------------------------------- objectives

WEIGHED = {
    "opsd": OPSD(beta=0.7),
    "opsd_k1": OPSD(beta=0.7, kl_mode="reward_k1"),
    "grpo": GRPO(),
    "opd": OPD(divergence="sampled"),
    "opd_ppo": OPDPPO(),
    "pi_distill": PiDistill(alpha=0.4, beta=0.7),
    "topr": PiDistill(alpha=0.4, beta=0.7, student_term="topr"),
    "sft": PiDistill(alpha=0.4, beta=0.7, student_term="sft"),
}


def losses(objective, rollouts, module, weights: list[list[float]] | None):
    """Loss per token with trained weights that have moved since sampling, and its gradient by logits' log-probs."""
    rollouts = [replace(r) for r in rollouts]
    for rollout in rollouts:
        rollout.behaviour_values = [0.3] * rollout.policy_tokens
        rollout.trainer_logprobs = recorded(rollout)
    for rollout, values in zip(rollouts, weights or [[1.0] * r.policy_tokens for r in rollouts], strict=True):
        rollout.importance_weights = values
    batch = batch_of(rollouts, objective.advantages(rollouts, 0))
    scores = score(module, batch, objective.score_request(0))
    loss = objective.token_loss(batch, scores, 0).loss
    return loss, torch.autograd.grad(loss.sum(), module.output.weight)[0]


@pytest.mark.parametrize("name", WEIGHED)
def test_weights_multiply_the_policy_gradient_and_nothing_else(name):
    """Twice the weight adds the policy-gradient loss once more; what else the method minimises is in neither difference."""
    objective, module, rollouts = WEIGHED[name], model(), random_rollouts(4)
    assert objective.takes_importance_weights
    ones, twice, thrice = ([[w] * r.policy_tokens for r in rollouts] for w in (1.0, 2.0, 3.0))
    (one, g1), (two, g2), (three, g3) = (losses(objective, rollouts, module, w) for w in (ones, twice, thrice))
    torch.testing.assert_close(three - two, two - one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(g3 - g2, g2 - g1, rtol=1e-3, atol=1e-5)
    assert (two - one).abs().max() > 1e-3
    pure = name in ("grpo", "opd", "opd_ppo", "opsd_k1")  # with reward_k1 the KL is part of the advantage
    assert torch.allclose(two, 2 * one, rtol=1e-4, atol=1e-5) == pure, "a KL or a supervised term must not be weighed"


def test_what_has_no_policy_gradient_takes_no_weights():
    assert not OPD(divergence="jsd").takes_importance_weights
    assert not PiDistill(alpha=0.0, student_term="sft").takes_importance_weights
    assert not PiDistill(alpha=0.0, student_term="snis").takes_importance_weights


# ------------------------------------------------------------------------------------------- rollouts and batches


def test_each_rollout_is_weighed_in_the_view_that_sampled_it():
    module, rollouts = model(), random_rollouts(4)
    rollouts = [replace(r, sampled_by=view) for r, view in zip(rollouts, ["teacher", "student"] * 2, strict=True)]
    batch = batch_of(rollouts)
    scores = score(module, batch, BOTH_VIEWS)
    weigher = TruncatedImportanceWeights(level="sequence", cap=3.0)
    weigher.weigh(rollouts, batch, scores)
    lengths = [r.policy_tokens for r in rollouts]
    by_view = {"student": scores.student_logprobs.split(lengths), "teacher": scores.teacher_logprobs.split(lengths)}
    trainer = [by_view[r.sampled_by][i].tolist() for i, r in enumerate(rollouts)]
    expected = slow_weights(trainer, [recorded(r) for r in rollouts], "sequence", 3.0)
    assert [r.trainer_logprobs for r in rollouts] == trainer
    torch.testing.assert_close(flat(r.importance_weights for r in rollouts), flat(expected), rtol=1e-4, atol=1e-7)
    weighed = batch_of(rollouts, [RolloutAdvantage(1.0)] * 4)
    torch.testing.assert_close(weighed.ratio_logprobs.double(), flat(trainer), rtol=1e-6, atol=0)
    torch.testing.assert_close(weighed.importance_weights.double(), flat(expected), rtol=1e-4, atol=1e-7)
    assert batch.importance_weights is None
    report = weigher.report(alone())
    uncut = slow_weights(trainer, [recorded(r) for r in rollouts], "sequence", math.inf)
    assert report["importance_weight_mean"] == pytest.approx(flat(expected).mean().item(), rel=1e-4)
    assert report["importance_truncated_frac"] == pytest.approx((flat(uncut) > 3.0).double().mean().item())
    assert weigher.report(alone()) == {}, "numbers of the round before"


def test_a_batch_without_rollouts_has_no_weights():
    weigher, batch = TruncatedImportanceWeights(), batch_of([], [])
    weigher.weigh([], batch, score(model(), batch, BOTH_VIEWS))
    assert batch.importance_weights is None and weigher.report(alone()) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"level": "turn"}, "importance_weights.level=turn is unknown"), ({"cap": 0.5}, "cap=0.5 must be at least 1")],
)
def test_weights_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TruncatedImportanceWeights(**settings)


# ------------------------------------------------------------------------------------------- measured and bounded


def alone() -> Run:
    return Run(CPU, torch.float32, 0, 1, 0, Path("unused"))


def meter(view="teacher", top_p=None, top_k=None, run=None, **cfg) -> MismatchMeter:
    return MismatchMeter(
        OmegaConf.create(cfg), run or alone(), TorchtuneSampler(max_new_tokens=1, top_p=top_p, top_k=top_k), view
    )


def looked_at(gap: float = 0.0, **settings):
    """A meter that has seen rollouts whose sampler said ``gap`` less than the trainer, and those numbers."""
    module, rollouts = model(), random_rollouts(3)
    scores = score(module, batch_of(rollouts), BOTH_VIEWS)
    lengths = [r.policy_tokens for r in rollouts]
    for rollout, own in zip(rollouts, scores.teacher_logprobs.split(lengths), strict=True):
        values = iter(own.tolist())
        rollout.sampled_logprobs = [next(values) - gap if policy else math.nan for policy in rollout.policy_mask]
    result = meter(**settings)
    result.look(batch_of(rollouts), scores)
    return result


def test_the_numbers_are_those_of_the_sampled_tokens_and_k3_is_never_negative():
    rollouts = random_rollouts(5)
    for rollout in rollouts:
        rollout.sampled_logprobs = [3 * x for x in rollout.sampled_logprobs]  # on both sides of a random model's −log 50
    batch = batch_of(rollouts)
    scores = score(model(), batch, BOTH_VIEWS)
    gaps = [a - b for a, b in zip(scores.teacher_logprobs.tolist(), flat(map(recorded, rollouts)).tolist(), strict=True)]
    whole = meter(max_sampler_mismatch_nats=100)
    whole.look(batch, scores)
    report = whole.report()
    assert report["sampler_mismatch_mean_nats"] == pytest.approx(sum(map(abs, gaps)) / len(gaps), rel=1e-5)
    assert report["sampler_mismatch_max_nats"] == pytest.approx(max(map(abs, gaps)), rel=1e-5)
    assert report["sampler_mismatch_k3_nats"] == pytest.approx(sum(math.exp(g) - 1 - g for g in gaps) / len(gaps), rel=1e-5)
    assert all(math.exp(g) - 1 - g >= 0 for g in gaps) and any(g < 0 for g in gaps) and any(g > 0 for g in gaps)


def test_demonstrations_and_what_the_other_view_sampled_are_left_out():
    rollouts = random_rollouts(4)
    rollouts = [replace(rollouts[0], sampled_logprobs=None), replace(rollouts[1], sampled_by="student"), *rollouts[2:]]
    batch = batch_of(rollouts)
    scores = score(model(), batch, BOTH_VIEWS)
    first = sum(r.policy_tokens for r in rollouts[:2])
    expected = scores.teacher_logprobs[first:].double() - flat(map(recorded, rollouts[2:]))
    trainer, sampler, rollout_index = logprobs_of_both(batch, scores, "teacher")
    torch.testing.assert_close(trainer - sampler, expected)
    assert torch.equal(rollout_index, batch.rollout_index[first:])
    assert len(logprobs_of_both(batch, scores, "student")[0]) == rollouts[1].policy_tokens


def test_only_the_first_update_of_a_round_is_looked_at():
    result = looked_at(gap=0.01)
    assert result.report()["sampler_mismatch_mean_nats"] == pytest.approx(0.01, rel=1e-3)
    moved = batch_of(random_rollouts(2))
    result.look(moved, score(model(seed=1), moved, BOTH_VIEWS))  # other weights by now: no mismatch of the sampler's
    assert result.report() == {}
    result.start_round()
    assert result.report() == {}, "no token was sampled"


@pytest.mark.parametrize("gap", [0.2, -0.2, math.inf])
def test_beyond_the_limit_the_run_stops_with_the_numbers(gap):
    with pytest.raises(InputError, match=rf"{abs(gap)} nats per token .* above max_sampler_mismatch_nats=0.1; .*model_dir"):
        looked_at(gap).report()


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, DEFAULT_LIMIT_NATS),
        ({"top_p": 1.0}, DEFAULT_LIMIT_NATS),
        ({"top_p": 0.9}, DEFAULT_LIMIT_NATS),
        ({"top_k": 20}, DEFAULT_LIMIT_NATS),
        ({"top_k": 20, "max_sampler_mismatch_nats": 0.3}, 0.3),
        ({"max_sampler_mismatch_nats": 2}, 2.0),
    ],
)
def test_the_limit_is_the_configs_also_where_the_sampler_truncates(settings, limit):
    with pytest.raises(InputError, match="above max_sampler_mismatch_nats"):
        looked_at(limit + 0.01, **settings).report()
    assert looked_at(limit - 0.01, **settings).report()["sampler_mismatch_mean_nats"] > 0


@pytest.mark.parametrize(
    ("settings", "gap", "unexplained"),
    [
        ({"top_p": 0.8}, -0.2, 0.0),  # the mass .82 was kept
        ({"top_p": 0.8}, -0.3, 0.3 + math.log(0.8)),  # less than top_p was kept
        ({"top_p": 0.8}, 0.2, 0.2),  # the trainer's log-prob is above the one of a distribution that was cut
        ({"top_k": 5}, -3.0, 0.0),
        ({"top_k": 5, "top_p": 0.8}, -3.0, 0.0),
        ({"top_k": 5}, 0.2, 0.2),
    ],
)
def test_what_top_p_and_top_k_explain_is_not_counted_against_the_limit(settings, gap, unexplained):
    report = looked_at(gap, **settings, max_sampler_mismatch_nats=unexplained + 0.001).report()
    assert report["sampler_mismatch_mean_nats"] == pytest.approx(abs(gap), rel=1e-4)
    assert report["sampler_mismatch_rollout_max_nats"] == pytest.approx(unexplained, abs=1e-5)
    if unexplained:
        with pytest.raises(InputError, match=rf"beyond what {'top_k' if 'top_k' in settings else 'top_p'} explains"):
            looked_at(gap, **settings, max_sampler_mismatch_nats=unexplained - 0.001).report()


def test_one_bad_rollout_shows_in_the_worst_rollouts_mean():
    module, rollouts = model(), random_rollouts(6)
    scores = score(module, batch_of(rollouts), BOTH_VIEWS)
    gaps = [0.0, 0.0, 0.0, 0.75, 0.0, -0.25]
    for rollout, gap, own in zip(
        rollouts, gaps, scores.teacher_logprobs.split([r.policy_tokens for r in rollouts]), strict=True
    ):
        values = iter(own.tolist())
        rollout.sampled_logprobs = [next(values) - gap if policy else math.nan for policy in rollout.policy_mask]
    whole = meter(max_sampler_mismatch_nats=1.0)
    whole.look(batch_of(rollouts), scores)
    assert whole.report()["sampler_mismatch_rollout_max_nats"] == pytest.approx(0.75, rel=1e-4)


@pytest.mark.parametrize("value", [0, -1.0, "much", True])
def test_a_limit_that_is_no_positive_number_is_refused(value):
    with pytest.raises(InputError, match=f"max_sampler_mismatch_nats={value} must be a number above 0"):
        meter(max_sampler_mismatch_nats=value)


class TwoRanks(Run):
    """This rank beside another one that saw 10 tokens, half a nat off each."""

    def sums(self, values):
        other = {"tokens": 10.0, "k3": 10 * (math.exp(0.5) - 1.5), "mean": 5.0, "unexplained": 5.0}
        return {name: value + other[name] for name, value in values.items()}

    def gather(self, items):
        return [*items, (0.5, 0.5)]


def test_the_ranks_numbers_are_added_so_that_all_of_them_stop():
    ranks = TwoRanks(CPU, torch.float32, 0, 2, 0, Path("unused"))
    report = looked_at(0.0, run=ranks, max_sampler_mismatch_nats=1.0).report()
    assert report["sampler_mismatch_max_nats"] == 0.5 and 0 < report["sampler_mismatch_mean_nats"] < 0.5
    with pytest.raises(InputError, match="nats per token away"):
        looked_at(0.0, run=ranks).report()
