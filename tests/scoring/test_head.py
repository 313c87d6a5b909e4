"""Test the head's one pass: gradients by hand against autograd over whole logits, and against the second pass."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pidistill import objectives
from pidistill.losses.divergences import divergence, entropy
from pidistill.losses.reductions import token_mean
from pidistill.objectives import OPSD, OPSDUCLA, SDPO, PiDistill, RoutedObjective
from pidistill.objectives.base import Objective
from pidistill.scoring import head, head_numbers
from pidistill.scoring.batch import policy_positions
from pidistill.scoring.head import ConstantPart, apply_head
from pidistill.scoring.head_numbers import ScorePlan
from pidistill.scoring.score import score, student_nll
from pidistill.types import Divergence, RolloutAdvantage, ScoreRequest
from tests.support.builders import batch_of, gradients, model, random_rollouts, relative_difference

TOKENS, HIDDEN, IDS = 11, 6, 23
ALL = tuple(
    Divergence(name, side, **options)
    for side in ("student", "teacher", "both", "none")
    for name, options in (
        ("kl_teacher_student", {}),
        ("kl_student_teacher", {}),
        ("jsd", {"beta": 0.3}),
        ("jsd", {"beta": 0.0}),
        ("jsd", {"beta": 1.0}),
        ("kl_teacher_student", {"entry_clip": 0.05}),
        ("jsd", {"beta": 0.5, "top_k": 4}),
    )
)


def inputs(dtype=torch.float64, ids=IDS):
    torch.manual_seed(0)
    weight, student, teacher = torch.randn(ids, HIDDEN), torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN)
    return [x.to(dtype).requires_grad_() for x in (weight, student, teacher)]


def mixed_loss(scores):
    """Some function, different for every number, of everything that has a gradient."""
    trained = [d for d in scores.divergences if d.grad != "none"]
    parts = [(1 + i) * torch.sin(scores.divergences[d]) for i, d in enumerate(trained)]
    return sum(parts) + scores.student_logprobs.exp() - 0.3 * scores.teacher_logprobs**2


def run(plan_loss, weight, student, teacher, *, targets, temperature=0.7, chunk_tokens=3, divergences=ALL):
    request = ScoreRequest(True, True, divergences=divergences)
    plan = ScorePlan(targets, request, temperature, chunk_tokens, plan_loss)
    return plan.as_scores(apply_head(plan, {"student": student, "teacher": teacher}, weight))


def passes(monkeypatch):
    """The list that grows by one with every pass over the chunks."""
    calls, original = [], head._chunk_by_chunk
    monkeypatch.setattr(head, "_chunk_by_chunk", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_gradients_by_hand_equal_autograd_over_whole_logits(one_pass, block, monkeypatch):
    """float64, 1e-11: every divergence and side, log-probs, temperature, ragged chunks and blocks of rows."""
    monkeypatch.setitem(head_numbers.BLOCK_ELEMENTS, "cpu", block)
    leaves, targets = inputs(), torch.arange(TOKENS) % IDS
    calls = passes(monkeypatch)
    scores = run((lambda _, s: mixed_loss(s)) if one_pass else None, *leaves, targets=targets)
    ours = torch.autograd.grad(mixed_loss(scores).sum() / 7, leaves)
    assert len(calls) == (1 if one_pass else 2)

    weight, *sides = leaves
    logp = [torch.log_softmax(h @ weight.T / 0.7, -1) for h in sides]
    picked = [x.gather(1, targets[:, None]).squeeze(1) for x in logp]
    by_name = {d: divergence(d, logp[1], logp[0]) for d in ALL}
    for d in ALL:
        torch.testing.assert_close(scores.divergences[d], by_name[d], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.student_entropy, entropy(logp[0]), rtol=1e-12, atol=1e-12)
    dense = mixed_loss(type(scores)(*picked, by_name, None, None))
    for own, expected in zip(ours, torch.autograd.grad(dense.sum() / 7, leaves), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-11)


def test_any_other_use_of_the_numbers_is_exact_too_and_gives_a_warning(monkeypatch):
    """Weights that differ between tokens: what was formed on the way is thrown away, and the second pass is taken."""
    leaves, targets = inputs(), torch.arange(TOKENS) % IDS
    weights = torch.linspace(0.5, 2.0, TOKENS).double()
    calls = passes(monkeypatch)
    with pytest.warns(UserWarning, match="not the one that was differentiated"):
        ours = torch.autograd.grad(
            (weights * mixed_loss(run(lambda _, s: mixed_loss(s), *leaves, targets=targets))).sum(), leaves
        )
    assert len(calls) == 2
    expected = torch.autograd.grad((weights * mixed_loss(run(None, *leaves, targets=targets))).sum(), leaves)
    for own, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stays_so_without_a_warning_about_another_loss():
    leaves, targets = inputs(), torch.arange(TOKENS) % IDS
    poison = torch.ones(TOKENS).double()
    poison[5] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = run(lambda part, s: poison[part] * mixed_loss(s), *leaves, targets=targets)
        grads = torch.autograd.grad((poison * mixed_loss(scores)).sum() / 7, leaves)
    assert grads[0].isnan().all() and grads[1].isnan().any(1).tolist() == [n == 5 for n in range(TOKENS)]


def test_a_second_backward_of_a_retained_graph_is_the_same_gradient():
    leaves, targets = inputs(), torch.arange(TOKENS) % IDS
    loss = 3.0 * mixed_loss(run(lambda _, s: mixed_loss(s), *leaves, targets=targets)).sum()
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    for own, again in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(own, again, rtol=1e-12, atol=1e-12)


def test_a_frozen_head_has_no_gradient_buffer():
    (weight, student, teacher), targets = inputs(), torch.arange(TOKENS) % IDS
    expected = torch.autograd.grad(mixed_loss(run(None, weight, student, teacher, targets=targets)).sum(), (student, teacher))
    frozen = weight.detach()
    scores = run(lambda _, s: mixed_loss(s), frozen, student, teacher, targets=targets)
    assert scores.student_logprobs.grad_fn is not None
    for own, other in zip(torch.autograd.grad(mixed_loss(scores).sum(), (student, teacher)), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_a_bf16_head_is_summed_in_fp32_in_one_pass():
    leaves, targets = inputs(torch.bfloat16), torch.arange(TOKENS) % IDS
    few = ALL[:2]
    grads = []
    for chunk_tokens in (None, 1):
        scores = run(lambda _, s: mixed_loss(s), *leaves, targets=targets, chunk_tokens=chunk_tokens, divergences=few)
        assert scores.student_logprobs.dtype == torch.float32
        grads.append(torch.autograd.grad(mixed_loss(scores).sum(), leaves)[0])
    assert grads[0].dtype == torch.bfloat16
    # Rounded once at the end, not once per token.
    assert (grads[0] - grads[1]).float().norm() / grads[0].float().norm() < 5e-3


def test_an_id_that_a_side_lacks_moves_nothing_on_that_side():
    """log-prob −inf whatever the logits: its gradient is 0 also where the loss's coefficient is not finite."""
    weight, student, _ = inputs(torch.float32)
    targets = torch.full((TOKENS,), IDS)
    request = ScoreRequest(True, False, views=("student",), entropy=False)
    plan = ScorePlan(targets, request, 1.0, 4, lambda _, s: s.student_logprobs.exp() * torch.inf)
    scores = plan.as_scores(apply_head(plan, {"student": student}, weight))
    assert scores.student_logprobs.isneginf().all()
    grads = torch.autograd.grad(scores.student_logprobs, (weight, student), torch.full((TOKENS,), torch.nan))
    assert all(not g.any() for g in grads)


def test_rows_of_certain_tokens_have_finite_gradients():
    """One probability 1 and the rest 0 in fp32, on one side or both: 0 · log 0 nowhere."""
    weight, student, teacher = inputs(torch.float32)
    student, teacher = ((x * 1e3).detach().requires_grad_() for x in (student, teacher))
    plain = tuple(d for d in ALL if d.top_k is None)
    targets = torch.arange(TOKENS) % IDS
    scores = run(None, weight, student, teacher, targets=targets, temperature=1.0, divergences=plain)
    total = sum(scores.divergences[d].sum() for d in plain if d.grad != "none")
    assert total.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, (weight, student, teacher)))


def test_a_constant_side_of_the_same_head_shares_the_product():
    """Its hidden states are rows of the one product; numbers and gradients are those of a side with weights of its own."""
    weight, student, teacher = inputs()
    wanted = tuple(d for d in ALL if d.grad in ("student", "none"))
    request = ScoreRequest(True, False, divergences=wanted)
    results = []
    for own_weight in (None, weight.detach().clone()):
        plan = ScorePlan(torch.arange(TOKENS) % IDS, request, 1.0, 4)
        constants = {"teacher": [ConstantPart(1.0, teacher.detach(), own_weight)]}
        scores = plan.as_scores(apply_head(plan, {"student": student}, weight, constants))
        total = sum((1 + i) * scores.divergences[d].sum() for i, d in enumerate(wanted) if d.grad == "student")
        results.append([scores.teacher_logprobs, *torch.autograd.grad(total, (weight, student))])
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ equal sides


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_equal_sides_have_a_gradient_of_exactly_0_in_the_head(one_pass, scale):
    """fp32, every divergence and side: a live teacher, one with the same head, and one whose own head has equal weights."""
    weight, student, _ = inputs(torch.float32, ids=301)
    student = (scale * student).detach().requires_grad_()
    trained = [d for d in ALL if d.grad != "none"]
    for own_weight, live in ((None, True), (None, False), (weight.detach().clone(), False)):
        wanted = [d for d in trained if live or d.grad == "student"]
        request = ScoreRequest(True, live, divergences=tuple(wanted))
        total = lambda _, s: sum((1.3 + i) * s.divergences[d] for i, d in enumerate(wanted))  # noqa: B023, E731
        plan = ScorePlan(torch.arange(TOKENS), request, 0.7, 4, total if one_pass else None)
        copy = student.detach().clone()
        constants = {} if live else {"teacher": [ConstantPart(1.0, copy, own_weight)]}
        hidden = {"student": student} | ({"teacher": copy.requires_grad_()} if live else {})
        scores = plan.as_scores(apply_head(plan, hidden, weight, constants))
        assert all(scores.divergences[d].abs().max() < 1e-6 for d in wanted) and len(wanted) > 3
        gradients_ = torch.autograd.grad(total(None, scores).sum(), (weight, *hidden.values()))
        assert not any(gradient.any() for gradient in gradients_)


def test_logits_of_equal_tokens_are_copied_and_others_are_not():
    weight, student, teacher = (x.detach() for x in inputs(torch.float32))
    teacher[::2] = student[::2]
    rows = head._rows_equal_to_student({"student": student, "teacher": teacher}, {}, None, weight, weight)
    assert rows["teacher"].tolist() == [n % 2 == 0 for n in range(TOKENS)]
    other = {"teacher": [ConstantPart(1.0, student, weight + 1e-3)]}
    assert head._rows_equal_to_student({"student": student}, other, None, weight, weight) == {}


# ------------------------------------------------------------------------------------------------ with a model and a method

METHODS = [getattr(objectives, name) for name in objectives.__all__ if name != "Objective"]
STUDENT_TERMS = [{"student_term": term} for term in ("topr", "sft")] + [{"kl_mode": "loss_k2"}, {"alpha": 0.0}, {"alpha": 1.0}]


def advantages_of(rollouts):
    return [RolloutAdvantage(0.7 * (-1) ** i, kl=[0.1] * r.policy_tokens, snis_weight=1.0) for i, r in enumerate(rollouts)]


OPTIONS = {SDPO: {"top_k": 10}, RoutedObjective: {"key": "domain", "objectives": {"a": OPSD(), "b": OPSDUCLA()}}}


@pytest.mark.parametrize(
    ("method", "options"), [(m, OPTIONS.get(m, {})) for m in METHODS] + [(PiDistill, o) for o in STUDENT_TERMS]
)
def test_the_head_forms_every_methods_loss_in_its_one_pass(method, options, monkeypatch):
    """Per-token losses of slices predict the step's gradient: one pass, no warning, and the gradient of the two-pass way."""
    objective, rollouts = method(**options), random_rollouts(5)
    for i, rollout in enumerate(rollouts):
        rollout.example = replace(rollout.example, data={"domain": "ab"[i % 2]})
    batch, results = batch_of(rollouts, advantages_of(rollouts)), []
    request = objective.score_request(0)
    calls = passes(monkeypatch)
    for loss in (objective.per_token_loss(0), None):
        module = model(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores = score(module, batch, request, temperature=0.8, chunk_tokens=4, loss=loss)
            token_mean(objective.token_loss(batch, scores, 0).loss, 40).backward()
        results.append(gradients(module))
    assert len(calls) == 3
    assert relative_difference(*results) < 1e-5


def test_a_loss_across_tokens_has_no_per_token_form():
    assert PiDistill(student_term="topr", topr_level="sequence").per_token_loss(0) is None
    assert isinstance(PiDistill(), Objective)


@pytest.mark.parametrize("rollouts", [0, 3])
def test_the_supervised_loss_is_finite_with_and_without_tokens(rollouts, monkeypatch):
    """without tokens a zero loss with a gradient function, and zero gradients everywhere."""
    module, batch = model(0), batch_of(random_rollouts(rollouts))
    calls = passes(monkeypatch)
    scores = score(module, batch, ScoreRequest(True, False, views=("student",)), loss=student_nll)
    loss = token_mean(student_nll(batch, scores), 12)
    loss.backward()
    assert len(calls) == 1 and loss.isfinite()
    assert all(p.grad is not None and bool(p.grad.any()) == bool(rollouts) for p in module.parameters())


def test_a_slice_of_a_batch_has_the_fields_of_its_tokens():
    rollouts = random_rollouts(3)
    batch = batch_of(rollouts, advantages_of(rollouts))
    part = batch.slice(slice(2, 5))
    assert part.targets.tolist() == [r.completion[t] for r in rollouts for t in policy_positions(r)][2:5]
    assert part.rollout_index.tolist() == batch.rollout_index[2:5].tolist()
    assert len(part.kl_advantages) == len(part.has_privileged) == 3
    assert part.views is batch.views


def test_memory_does_not_grow_with_tokens():
    """The bound of benchmarks/scorer.py at a size that takes seconds: twice the tokens, the same peak."""
    script = Path(__file__).parents[2] / "benchmarks" / "scorer.py"
    peaks = []
    for tokens in (320, 640):
        sizes = ["--hidden", "64", "--vocabulary", "65536", "--chunk-tokens", "160", "--case", f"jsd_both:pidistill:{tokens}"]
        done = subprocess.run([sys.executable, str(script), *sizes], capture_output=True, text=True, check=True, timeout=300)
        peaks.append(json.loads(done.stdout.splitlines()[-1])["bytes"] / 2**30)
    few, many = peaks
    assert many < few + 0.05
