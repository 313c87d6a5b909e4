"""The scorer against the whole [tokens, vocabulary] computation: values, gradients, and who gets none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchtune.models.qwen2 import qwen2

from pidistill.divergences import divergence, entropy
from pidistill.packing import policy_positions
from pidistill.scoring import score
from pidistill.testing import TINY_SIZES, perturb_weights
from pidistill.types import Divergence, ScoreRequest
from tests.builders import CPU, VOCABULARY, batch_of, gradients, model, random_rollouts, relative_difference

DIVERGENCES = (
    Divergence("kl_teacher_student", "student"),
    Divergence("kl_teacher_student", "teacher"),
    Divergence("kl_student_teacher", "both"),
    Divergence("jsd", "both", beta=0.3),
    Divergence("kl_student_teacher", "none"),
)


def dense_scores(student_model, teacher_model, rollouts, temperature):
    """The slow obvious version: each rollout and view on its own, unpadded, all logits, log-softmax, gather."""
    logps = {"student": [], "teacher": []}
    targets = []
    for rollout in rollouts:
        for view, module in (("student", student_model), ("teacher", teacher_model)):
            prompt = rollout.prompts.of(view)
            logits = module(torch.tensor([prompt + rollout.completion]))[0].double()
            # The token at index t of the completion is predicted at the position before it.
            rows = [len(prompt) + t - 1 for t in policy_positions(rollout)]
            logps[view].append(torch.log_softmax(logits[rows] / temperature, -1))
        targets += [rollout.completion[t] for t in policy_positions(rollout)]
    student, teacher = (torch.cat(logps[view]) for view in ("student", "teacher"))
    picked = torch.tensor(targets)[:, None]
    return {
        "student_logprobs": student.gather(1, picked).squeeze(1),
        "teacher_logprobs": teacher.gather(1, picked).squeeze(1),
        "student_entropy": entropy(student),
        "teacher_entropy": entropy(teacher),
        "divergences": {d: divergence(d, teacher, student) for d in DIVERGENCES},
    }


def tied_model(seed: int):
    torch.manual_seed(seed)
    module = qwen2(vocab_size=VOCABULARY, tie_word_embeddings=True, **TINY_SIZES)
    perturb_weights(module)
    return module


@pytest.mark.parametrize("build", [model, tied_model], ids=["untied", "tied"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 5])
def test_scores_and_gradients_equal_the_dense_computation(build, temperature, chunk_tokens):
    """T-a (padding, chunk size), T-h (alignment in both views, ragged prompts, several turns)."""
    module, rollouts = build(0), random_rollouts(5)
    request = ScoreRequest(student_grad=True, teacher_grad=True, divergences=DIVERGENCES)
    scores = score(module, batch_of(rollouts), request, temperature=temperature, chunk_tokens=chunk_tokens)
    dense = dense_scores(module, module, rollouts, temperature)
    weights = torch.randn(len(DIVERGENCES) + 2, len(scores.student_logprobs), generator=torch.Generator().manual_seed(1))

    def scalar(student, teacher, divergences):
        parts = [student, teacher, *[divergences[d] for d in DIVERGENCES]]
        return sum((w.to(p.dtype) * p).sum() for w, p in zip(weights, parts, strict=True))

    for name in ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy"):
        torch.testing.assert_close(getattr(scores, name).double(), dense[name].double(), atol=2e-5, rtol=1e-5)
    for d in DIVERGENCES:
        torch.testing.assert_close(scores.divergences[d].double(), dense["divergences"][d].double(), atol=2e-5, rtol=1e-5)
    scalar(scores.student_logprobs, scores.teacher_logprobs, scores.divergences).backward()
    ours = gradients(module)
    module.zero_grad()
    scalar(dense["student_logprobs"], dense["teacher_logprobs"], dense["divergences"]).backward()
    assert relative_difference(ours, gradients(module)) < 2e-6


@pytest.mark.parametrize("trained", ["student", "teacher"])
def test_a_side_without_gradient_is_a_constant(trained):
    """One trained side: the same numbers as with both, and the gradient of the dense version with the other side detached."""
    module, rollouts = model(0), random_rollouts(4)
    divergences = (Divergence("kl_teacher_student", trained), Divergence("kl_student_teacher", trained))
    request = ScoreRequest(student_grad=trained == "student", teacher_grad=trained == "teacher", divergences=divergences)
    scores = score(module, batch_of(rollouts), request)
    total = sum(scores.divergences[d].sum() for d in divergences) + getattr(scores, f"{trained}_logprobs").sum()
    total.backward()
    ours = gradients(module)
    other = "teacher" if trained == "student" else "student"
    probe = torch.autograd.grad
    constant = getattr(score(module, batch_of(rollouts), request), f"{other}_logprobs")
    assert not any(
        g is not None and g.abs().max() > 0 for g in probe(constant.sum(), list(module.parameters()), allow_unused=True)
    )

    module.zero_grad()
    dense = dense_scores(module, module, rollouts, 1.0)
    full = [Divergence(d.name, trained) for d in divergences]
    logps = dense[f"{trained}_logprobs"].sum()
    recomputed = dense_divergences(module, rollouts, full)
    (logps + sum(recomputed)).backward()
    assert relative_difference(ours, gradients(module)) < 2e-6


def dense_divergences(module, rollouts, divergences):
    totals = []
    for d in divergences:
        total = 0.0
        for rollout in rollouts:
            logps = {}
            for view in ("student", "teacher"):
                prompt = rollout.prompts.of(view)
                rows = [len(prompt) + t - 1 for t in policy_positions(rollout)]
                logits = module(torch.tensor([prompt + rollout.completion]))[0].double()
                logps[view] = torch.log_softmax(logits[rows], -1)
            total = total + divergence(d, logps["teacher"], logps["student"]).sum()
        totals.append(total)
    return totals


def test_another_model_as_teacher_scores_the_teacher_view_and_gets_no_gradient():
    student, teacher, rollouts = model(0), model(1), random_rollouts(4)
    divergences = (Divergence("kl_student_teacher", "student"),)
    request = ScoreRequest(student_grad=True, teacher_grad=False, divergences=divergences)
    scores = score(student, batch_of(rollouts), request, teacher=teacher)
    dense = dense_scores(student, teacher, rollouts, 1.0)
    torch.testing.assert_close(scores.teacher_logprobs.double(), dense["teacher_logprobs"].double(), atol=2e-5, rtol=1e-5)
    scores.divergences[divergences[0]].sum().backward()
    assert gradients(teacher) == {}
    assert gradients(student)


def test_nothing_is_left_on_the_model():
    module = model(0)
    request = ScoreRequest(student_grad=True, teacher_grad=False, views=("student",))
    before = module(torch.tensor([[1, 2, 3]]))
    score(module, batch_of(random_rollouts(2)), request)
    assert "unembed" not in vars(module)
    torch.testing.assert_close(module(torch.tensor([[1, 2, 3]])), before)
    assert before.shape == (1, 3, VOCABULARY)


def test_padding_side_amount_and_id_change_nothing():
    """T-a: a longer companion row pads the others; the pad id is never looked at."""
    module, rollouts = model(0), random_rollouts(6)
    request = ScoreRequest(student_grad=True, teacher_grad=True, divergences=DIVERGENCES)
    together = score(module, batch_of(rollouts), request)
    other_pad = score(module, batch_of(rollouts, pad_id=7), request)
    alone = [score(module, batch_of([r]), request) for r in rollouts]
    torch.testing.assert_close(together.student_logprobs, other_pad.student_logprobs, atol=0, rtol=0)
    torch.testing.assert_close(together.student_logprobs, torch.cat([s.student_logprobs for s in alone]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.teacher_logprobs, torch.cat([s.teacher_logprobs for s in alone]), atol=1e-5, rtol=1e-5)


def test_an_empty_batch_has_a_zero_loss_with_a_gradient_function():
    """T-j: a rank without policy tokens takes part in the backward, with gradients that are exactly zero."""
    module = model(0)
    request = ScoreRequest(student_grad=True, teacher_grad=True, divergences=DIVERGENCES)
    scores = score(module, batch_of([]), request)
    loss = scores.student_logprobs.sum() + sum(scores.divergences[d].sum() for d in DIVERGENCES)
    assert loss.item() == 0.0
    assert loss.grad_fn is not None
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_bf16_is_within_tolerance_of_fp32():
    """T-l: bf16 weights and hidden states, fp32 softmax and KL."""
    module, rollouts = model(0), random_rollouts(6)
    low = model(0).to(torch.bfloat16)
    request = ScoreRequest(student_grad=False, teacher_grad=False, divergences=DIVERGENCES)
    exact, rough = score(module, batch_of(rollouts), request), score(low, batch_of(rollouts), request)
    assert rough.student_logprobs.dtype == torch.float32
    torch.testing.assert_close(rough.student_logprobs, exact.student_logprobs, atol=0.06, rtol=0.05)
    for d in DIVERGENCES:
        torch.testing.assert_close(rough.divergences[d], exact.divergences[d], atol=0.06, rtol=0.1)
        assert (rough.divergences[d] >= -1e-5).all()


def test_a_bf16_head_is_summed_over_chunks_in_fp32():
    low, rollouts = model(0).to(torch.bfloat16), random_rollouts(12)
    request = ScoreRequest(student_grad=True, teacher_grad=True, divergences=DIVERGENCES[:2])
    grads = []
    for chunk_tokens in (None, 1):
        low.zero_grad()
        scores = score(low, batch_of(rollouts), request, chunk_tokens=chunk_tokens)
        scores.divergences[DIVERGENCES[0]].sum().backward()
        grads.append(low.output.weight.grad.float())
    # Rounded once at the end, not once per token.
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 5e-3


def test_given_teacher_weights_beside_a_trained_live_teacher():
    """π-Distill with a frozen teacher: T is live and trained, and only the student's own KL is to the frozen weights."""
    live, frozen, rollouts = model(0), model(1), random_rollouts(4)
    to_student, to_teacher = Divergence("kl_teacher_student", "student"), Divergence("kl_teacher_student", "teacher")
    request = ScoreRequest(True, True, divergences=(to_student, to_teacher))
    scores = score(live, batch_of(rollouts), request, teacher=frozen)
    own, given = dense_scores(live, live, rollouts, 1.0), dense_scores(live, frozen, rollouts, 1.0)
    dense = (given["divergences"][to_student], own["divergences"][to_teacher])
    for ours, expected in zip((scores.divergences[to_student], scores.divergences[to_teacher]), dense, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores.teacher_logprobs.double(), own["teacher_logprobs"].double(), atol=2e-5, rtol=1e-5)
    (scores.divergences[to_student] + 2 * scores.divergences[to_teacher]).sum().backward()
    ours = gradients(live)
    live.zero_grad()
    frozen.zero_grad()
    (dense[0] + 2 * dense[1]).sum().backward()
    assert relative_difference(ours, gradients(live)) < 2e-6


def test_a_trained_teacher_view_is_the_live_one_whatever_weights_are_given():
    live, rollouts = model(0), random_rollouts(3)
    request = ScoreRequest(False, True, divergences=(Divergence("kl_teacher_student", "teacher"),))
    given = score(live, batch_of(rollouts), request, teacher=model(1))
    torch.testing.assert_close(given.teacher_logprobs, score(live, batch_of(rollouts), request).teacher_logprobs)


def test_device_of_batches_is_the_one_asked_for():
    assert batch_of(random_rollouts(2)).targets.device == CPU


@pytest.mark.slow
def test_memory_does_not_grow_with_tokens():
    """The bound of benchmarks/scorer_memory.py at a size that takes seconds: twice the tokens, the same peak."""
    script = Path(__file__).parents[1] / "benchmarks" / "scorer_memory.py"
    sizes = ["--hidden", "64", "--vocabulary", "65536", "--chunk-tokens", "160", "--tokens", "320", "640"]
    done = subprocess.run([sys.executable, str(script), *sizes], capture_output=True, text=True, check=True, timeout=300)
    peaks = [float(line.split("peak ")[1].split()[0]) for line in done.stdout.splitlines() if "peak " in line]
    few, many = peaks
    assert many < few + 0.1
