"""SDAR, TOP-D, DemoPSD, RLSD: what each one is, by exact enumeration, and that gates, factors and weights are constants."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from pidistill.errors import InputError
from pidistill.losses.divergences import divergence, generalised_jsd, kl
from pidistill.losses.token_gap import credit_factor, gated_advantage, proximal_advantage, token_gap
from pidistill.losses.token_weights import DISAGREEMENT, Chain, DisagreementDamping, SkipFirst
from pidistill.objectives import GRPO, OPD, OPDPPO, OPSD, OPSDUCLA, RLSD, SDAR, SDPO, PiDistill
from pidistill.objectives.base import student_divergence
from pidistill.types import Divergence, RolloutAdvantage, Scores
from tests.support.builders import batch_of, random_rollouts
from tests.support.objective_runs import expected_gradient
from tests.support.oracles import MarkovChain

CHAINS = [(seed, end) for seed in range(3) for end in (None, 1)]
REWARD_FREE = {"clip_low": 0.0, "clip_high": 1e9}


def student_chain(seed: int, end: int | None) -> MarkovChain:
    return MarkovChain.seeded(seed, sampler="student", end=end)


def random_scores(count: int, seed: int = 0, agree: bool = False) -> tuple[Scores, torch.Tensor]:
    """Scores whose student log-probs are a leaf; the teacher's are others, or the same."""
    generator = torch.Generator().manual_seed(seed)
    student = (-3.0 * torch.rand(count, generator=generator, dtype=torch.float64)).requires_grad_()
    teacher = -3.0 * torch.rand(count, generator=generator, dtype=torch.float64)
    return Scores(student, student.detach().clone() if agree else teacher, {}, None, None), student


def sampled(count: int = 8, seed: int = 0, advantage: float | None = None):
    rollouts = [replace(r, sampled_by="student") for r in random_rollouts(count, seed)]
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return batch_of(rollouts, [RolloutAdvantage(v if advantage is None else advantage) for v in values])


def test_the_gap_is_the_teachers_log_prob_less_the_students_and_a_constant():
    scores, student = random_scores(5)
    gap = token_gap(replace(scores, teacher_logprobs=scores.teacher_logprobs.requires_grad_()))
    assert torch.equal(gap, scores.teacher_logprobs.detach() - student.detach()) and not gap.requires_grad


# ------------------------------------------------------------------------------------------- SDAR


@pytest.mark.parametrize(("seed", "end"), CHAINS)
def test_sdars_published_loss_its_advantage_and_ours_less_a_half_have_one_expected_gradient(seed, end):
    chain, weight, beta = student_chain(seed, end), 0.3, 5.0

    def published(tokens):
        gate = torch.sigmoid(beta * (tokens.q - tokens.p)).detach()
        return weight * gate * (tokens.q.detach() - tokens.p)

    truth = chain.expected_gradient(published)
    assert truth.norm() > 1e-2
    for centred in (True, False):
        objective = SDAR(gap_weight=weight, gate_beta=beta, centred=centred, **REWARD_FREE)
        torch.testing.assert_close(expected_gradient(objective, chain), truth, atol=1e-10, rtol=1e-9)
    constant = chain.expected_gradient(lambda tokens: weight * (tokens.q.detach() - tokens.p))
    assert constant.abs().max() < 1e-10  # their constant gate: noise alone


def test_sdars_extra_advantage_is_bounded_and_exactly_zero_where_the_teacher_agrees():
    gap = torch.linspace(-40, 40, 81, dtype=torch.float64)
    extra = gated_advantage(gap, 5.0, centred=True)
    assert extra.abs().max() <= 0.5 and (extra * gap >= 0).all()
    batch = sampled()
    scores, _ = random_scores(len(batch.targets), agree=True)
    assert torch.equal(SDAR(gap_weight=9.0).token_advantages(batch, scores, 0), batch.advantages)
    with pytest.raises(InputError, match=r"objective\.gate_beta=0\.0 must be above 0: a constant gate"):
        SDAR(gate_beta=0.0)


# ------------------------------------------------------------------------------------------- TOP-D


@pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])
@pytest.mark.parametrize(("seed", "end"), CHAINS)
def test_top_d_has_the_gradient_of_the_kl_to_the_mixture_at_fixed_prefixes(alpha, seed, end):
    chain = student_chain(seed, end)
    student, teacher = torch.softmax(chain.W, -1), torch.softmax(chain.W + chain.P, -1)
    mixture = alpha * teacher + (1 - alpha) * student

    def value(W):
        p = torch.softmax(W, -1)
        per_prefix = (p * (p.log() - mixture.log())).sum(-1)
        return sum(
            chain.logprob("student", chain.W, y).exp() * sum(per_prefix[prev] for prev in chain.previous(y))
            for y in chain.sequences()
        )

    ours = expected_gradient(OPD(proximal_alpha=alpha), chain)
    torch.testing.assert_close(ours, chain.gradient(value), atol=1e-10, rtol=1e-9)


def test_the_proximal_advantage_is_bounded_below_sums_to_one_and_ends_at_the_gap():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.log_softmax(4 * torch.randn(9, generator=generator, dtype=torch.float64), -1) for _ in "ST")
    gap = teacher - student
    for alpha in (0.1, 0.5, 0.9):
        advantage = proximal_advantage(gap, alpha)
        assert (advantage >= math.log(1 - alpha)).all() and advantage.min() < 0 < advantage.max()
        assert float((student.exp() * advantage.exp()).sum()) == pytest.approx(1.0, abs=1e-12)
        expected = torch.tensor([math.log(1 - alpha + alpha * math.exp(x)) for x in gap.tolist()], dtype=torch.float64)
        torch.testing.assert_close(advantage, expected)
    assert proximal_advantage(gap, 1.0) is gap and not proximal_advantage(torch.zeros(3), 0.3).any()
    assert proximal_advantage(torch.tensor([-1e4, 1e4]), 0.2).tolist() == pytest.approx([math.log(0.8), 1e4 + math.log(0.2)])
    for settings in ({"proximal_alpha": 0.0}, {"proximal_alpha": 1.5}, {"proximal_alpha": 0.5, "divergence": "jsd"}):
        with pytest.raises(InputError, match=r"objective\.proximal_alpha="):
            OPD(**settings)


# ------------------------------------------------------------------------------------------- DemoPSD


def full_scores(count: int, seed: int, agree: bool = False):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 7, generator=generator, dtype=torch.float64).requires_grad_()
    student = torch.log_softmax(logits, -1)
    teacher = student.detach() if agree else torch.log_softmax(2 * torch.randn(count, 7, generator=generator).double(), -1)
    return logits, student, teacher


@pytest.mark.parametrize("seed", range(3))
def test_damping_has_the_gradient_of_the_papers_explicit_normalised_target(seed):
    batch, damping = sampled(), DisagreementDamping(most=0.6, beta=3.0)
    logits, student, teacher = full_scores(len(batch.targets), seed)
    disagreement = generalised_jsd(teacher, student.detach(), 0.5)
    scores = Scores(None, None, {DISAGREEMENT: disagreement}, None, None)
    ours = damping(kl(student, teacher), batch, scores)
    (gradient,) = torch.autograd.grad(ours.sum(), logits, retain_graph=True)
    alpha = (0.6 * torch.tanh(3.0 * disagreement / 2))[:, None]
    assert 0.02 < float(alpha.min()) < float(alpha.max()) < 0.6
    target = torch.log_softmax((1 - alpha) * teacher + alpha * student.detach(), -1)
    (expected,) = torch.autograd.grad(kl(student, target).sum(), logits)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-9)


def test_damping_lies_within_its_bounds_and_is_1_where_both_agree():
    batch = sampled()
    ones = torch.ones(len(batch.targets), dtype=torch.float64)
    for agree in (True, False):
        _, student, teacher = full_scores(len(batch.targets), 0, agree)
        scores = Scores(None, None, {DISAGREEMENT: generalised_jsd(teacher, student.detach(), 0.5)}, None, None)
        weight = DisagreementDamping()(ones, batch, scores)
        assert (weight >= 0.85).all() and (weight <= 1.0).all() and bool((weight == 1.0).all()) == agree
    with pytest.raises(InputError, match="needs both views, and this `objective` scores one"):
        DisagreementDamping()(ones, batch, Scores(None, None, {}, None, None))
    with pytest.raises(InputError, match=r"token_weight\.most=1\.2 must lie in \[0, 1\]"):
        DisagreementDamping(most=1.2)
    with pytest.raises(InputError, match=r"token_weight\.beta=0\.0 must be above 0"):
        DisagreementDamping(beta=0.0)


def test_what_a_token_weight_reads_is_asked_for_also_inside_a_chain():
    damping = DisagreementDamping()
    for weight in (damping, Chain([SkipFirst(1), damping, damping])):
        for objective in (SDPO(divergence="kl_student_teacher", token_weight=weight), OPSDUCLA(token_weight=weight)):
            assert objective.score_request(0).divergences.count(DISAGREEMENT) == 1
        both = OPD, OPDPPO, OPSD, PiDistill, SDAR, RLSD, partial(GRPO, report_teacher_kl=True), partial(OPD, divergence="jsd")
        assert all(method(token_weight=weight).score_request(0).divergences.count(DISAGREEMENT) == 1 for method in both)
        assert not GRPO(token_weight=weight).score_request(0).divergences
    assert DISAGREEMENT not in SDPO(token_weight=SkipFirst(1)).score_request(0).divergences
    assert divergence(DISAGREEMENT, torch.zeros(1, 3).log_softmax(-1), torch.zeros(1, 3).log_softmax(-1)).item() == 0.0
    assert student_divergence("jsd", 0.5) != DISAGREEMENT == Divergence("jsd", grad="none", beta=0.5)


# ------------------------------------------------------------------------------------------- RLSD


@pytest.mark.parametrize("only", ["all", "negative", "positive"])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_credit_factor_equals_the_formula_keeps_the_sign_and_stays_in_its_bounds(only, weight):
    generator = torch.Generator().manual_seed(0)
    gap = 2 * torch.randn(200, generator=generator, dtype=torch.float64)
    advantages = torch.randn(200, generator=generator, dtype=torch.float64)
    advantages[:20] = 0.0
    ours = credit_factor(gap, advantages, weight, 0.2, only)
    for a, d, factor in zip(advantages.tolist(), gap.tolist(), ours.tolist(), strict=True):
        sign = (a > 0) - (a < 0)
        counts = sign and (only == "all" or (sign > 0) == (only == "positive"))
        clipped = min(max(math.exp(sign * d), 0.8), 1.2)
        assert factor == pytest.approx((1 - weight) + weight * clipped if counts else 1.0, abs=1e-12)
        assert abs(factor - 1) <= weight * 0.2 + 1e-12 and factor > 0
    assert credit_factor(torch.tensor([1e30, -torch.inf]), torch.tensor([1.0, 1.0]), 0.5, 0.2).isfinite().all()


def test_rlsd_is_grpo_bit_for_bit_without_weight_and_where_the_teacher_agrees():
    batch, settings = sampled(), {"clip_high": 1.28, "advantage": "standardised"}
    for objective, agree in ((RLSD(gap_weight=0.0), False), (RLSD(gap_weight=0.7), True)):
        scores, leaf = random_scores(len(batch.targets), agree=agree)
        answers = [o.token_loss(batch, scores, 0).loss for o in (objective, GRPO(**settings))]
        gradients = [torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in answers]
        assert torch.equal(*answers) and torch.equal(*gradients)


def test_rlsd_has_no_gradient_through_its_factor_and_none_to_the_teacher():
    batch = sampled()
    scores, leaf = random_scores(len(batch.targets))
    scores.teacher_logprobs.requires_grad_()
    objective = RLSD(gap_weight=1.0, clip_low=0.0, clip_high=1e9)
    answer = objective.token_loss(batch, scores, 0)
    student, teacher = torch.autograd.grad(
        answer.loss.sum(), (leaf, scores.teacher_logprobs), allow_unused=True, materialize_grads=True
    )
    ratio = (leaf - batch.ratio_logprobs).exp()
    expected = -(batch.advantages * answer.metrics["credit_factor_mean"] * ratio).detach()
    torch.testing.assert_close(student, expected)
    assert not teacher.any() and (answer.metrics["credit_factor_mean"] != 1).any()


def test_rows_without_privileged_information_have_factor_1_unless_another_model_teaches():
    batch = sampled()
    batch.has_privileged[::2] = False
    scores, _ = random_scores(len(batch.targets))
    factor = RLSD().factor(batch, scores, 0)
    assert (factor[::2] == 1).all() and (factor[1::2] != 1).any()
    assert (RLSD(no_pi="distill").factor(batch, scores, 0)[::2] != 1).any()
    for settings in ({"gap_clip": 1.0}, {"only": "some"}, {"gap_weight": 2.0}, {"no_pi": "drop"}):
        with pytest.raises(InputError, match=f"objective.{next(iter(settings))}="):
            RLSD(**settings)


def test_each_method_reports_what_its_option_changes_and_none_overrides_a_key_without_a_word():
    batch = sampled()
    scores, _ = random_scores(len(batch.targets))
    gap = scores.teacher_logprobs - scores.student_logprobs.detach()
    gate = SDAR(gap_weight=0.5, gate_beta=2.0).token_loss(batch, scores, 0).metrics["gap_gate_mean"]
    torch.testing.assert_close(gate, torch.sigmoid(2.0 * gap) - 0.5)
    changed = OPD(proximal_alpha=0.2).token_loss(batch, scores, 0).metrics["proximal_change_nats"]
    torch.testing.assert_close(changed, (torch.log(0.8 + 0.2 * gap.exp()) - gap).abs(), rtol=1e-4, atol=1e-5)
    assert "proximal_change_nats" not in OPD().token_loss(batch, scores, 0).metrics and (changed > 0).all()
    for method in (SDAR, RLSD):
        assert method(report_teacher_kl=True).uses_teacher
        with pytest.raises(InputError, match=rf"report_teacher_kl=False has no effect on {method.__name__}, .*remove the key"):
            method(report_teacher_kl=False)
