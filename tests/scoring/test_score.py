"""Test the scorer against the whole [tokens, vocabulary] computation: values, gradients, and where there is no gradient."""

import pytest
import torch
from torchtune.models.llama3 import lora_llama3
from torchtune.models.qwen2 import qwen2
from torchtune.modules.peft import disable_adapter

from pidistill.errors import InputError
from pidistill.losses.divergences import divergence, entropy
from pidistill.models.adapters import train_adapters_only
from pidistill.scoring.batch import policy_positions
from pidistill.scoring.score import score
from pidistill.teachers import AdapterOffTeacher, FrozenTeacher, LiveTeacher, TrustRegionTeacher
from pidistill.testing import TINY_SIZES, perturb_weights, tiny_model
from pidistill.types import Divergence, ScoreRequest
from tests.support.builders import CPU, VOCABULARY, batch_of, gradients, model, random_rollouts, relative_difference

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
@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_scores_and_gradients_equal_the_dense_computation(build, temperature, chunk_tokens, packing):
    """Padding, packing and chunk size change nothing; both views are aligned, with ragged prompts and several turns."""
    module, rollouts = build(0), random_rollouts(5)
    request = ScoreRequest(student_grad=True, teacher_grad=True, divergences=DIVERGENCES)
    batch = batch_of(rollouts, packing=packing)
    scores = score(module, batch, request, temperature=temperature, chunk_tokens=chunk_tokens)
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


def test_scoring_leaves_nothing_on_the_model():
    module = model(0)
    request = ScoreRequest(student_grad=True, teacher_grad=False, views=("student",))
    before = module(torch.tensor([[1, 2, 3]]))
    score(module, batch_of(random_rollouts(2)), request)
    assert "unembed" not in vars(module)
    torch.testing.assert_close(module(torch.tensor([[1, 2, 3]])), before)
    assert before.shape == (1, 3, VOCABULARY)


def test_padding_side_amount_and_id_change_nothing():
    """a longer companion row pads the others; the pad id is never looked at."""
    module, rollouts = model(0), random_rollouts(6)
    request = ScoreRequest(student_grad=True, teacher_grad=True, divergences=DIVERGENCES)
    together = score(module, batch_of(rollouts), request)
    other_pad = score(module, batch_of(rollouts, pad_id=7), request)
    alone = [score(module, batch_of([r]), request) for r in rollouts]
    torch.testing.assert_close(together.student_logprobs, other_pad.student_logprobs, atol=0, rtol=0)
    torch.testing.assert_close(together.student_logprobs, torch.cat([s.student_logprobs for s in alone]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.teacher_logprobs, torch.cat([s.teacher_logprobs for s in alone]), atol=1e-5, rtol=1e-5)


def test_an_empty_batch_has_a_zero_loss_with_a_gradient_function():
    """a rank without policy tokens takes part in the backward, with gradients that are exactly zero."""
    module = model(0)
    request = ScoreRequest(student_grad=True, teacher_grad=True, divergences=DIVERGENCES)
    scores = score(module, batch_of([]), request)
    loss = scores.student_logprobs.sum() + sum(scores.divergences[d].sum() for d in DIVERGENCES)
    assert loss.item() == 0.0
    assert loss.grad_fn is not None
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_bf16_is_within_tolerance_of_fp32():
    """bf16 weights and hidden states, fp32 softmax and KL."""
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


# ------------------------------------------------------------------------------------------- teachers of other kinds


def side_logits(module, rollouts, view):
    """[N, V] float64 logits of the policy tokens, each rollout on its own; through ``module`` as it is now."""
    rows = []
    for rollout in rollouts:
        prompt = rollout.prompts.of(view)
        logits = module(torch.tensor([prompt + rollout.completion]))[0].double()
        rows.append(logits[[len(prompt) + t - 1 for t in policy_positions(rollout)]])
    return torch.cat(rows)


def targets_of(rollouts):
    return torch.tensor([rollout.completion[t] for rollout in rollouts for t in policy_positions(rollout)])


STUDENT_DIVERGENCES = (
    Divergence("kl_teacher_student", "student"),
    Divergence("kl_student_teacher", "student"),
    Divergence("jsd", "student", beta=0.3),
    Divergence("kl_teacher_student", "student", entry_clip=0.05),
    Divergence("kl_student_teacher", "student", top_k=5),
    Divergence("jsd", "student", beta=0.5, top_k=3),
)


def check_student_side(model_, teacher, rollouts, teacher_logits, student_logits, *, temperature=1.0, chunk_tokens=2):
    """Values and gradients of a trained student beside a teacher of the given [N, V] logits, by the dense computation."""
    request = ScoreRequest(student_grad=True, teacher_grad=False, divergences=STUDENT_DIVERGENCES)
    batch = batch_of(rollouts)
    scores = score(model_, batch, request, temperature=temperature, teacher=teacher, chunk_tokens=chunk_tokens)
    size = min(teacher_logits.shape[1], student_logits.shape[1])
    full = {side: torch.log_softmax(x / temperature, -1) for side, x in (("t", teacher_logits), ("s", student_logits))}
    cropped = {
        side: torch.log_softmax(x[:, :size] / temperature, -1) for side, x in (("t", teacher_logits), ("s", student_logits))
    }
    picked = targets_of(rollouts)[:, None]
    expected = {d: divergence(d, cropped["t"].detach(), cropped["s"]) for d in STUDENT_DIVERGENCES}
    own = full["s"].gather(1, picked).squeeze(1)
    torch.testing.assert_close(scores.student_logprobs.double(), own, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores.teacher_logprobs.double(), full["t"].gather(1, picked).squeeze(1), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores.teacher_entropy.double(), entropy(full["t"]), atol=2e-5, rtol=1e-5)
    for d in STUDENT_DIVERGENCES:
        torch.testing.assert_close(scores.divergences[d].double(), expected[d], atol=2e-5, rtol=2e-5)
    assert not scores.teacher_logprobs.requires_grad or not any(
        g is not None and g.any()
        for g in torch.autograd.grad(scores.teacher_logprobs.sum(), trainable(model_), allow_unused=True, retain_graph=True)
    )
    weights = torch.linspace(0.3, 1.7, len(own)).double()
    model_.zero_grad()
    sum((weights.float() * scores.divergences[d]).sum() for d in STUDENT_DIVERGENCES).add(
        scores.student_logprobs.sum()
    ).backward()
    ours = gradients(model_)
    model_.zero_grad()
    (sum((weights * expected[d]).sum() for d in STUDENT_DIVERGENCES) + own.sum()).backward()
    assert relative_difference(ours, gradients(model_)) < 5e-6


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def lora_model(seed: int = 0, **settings):
    """A model with adapters that do something, of which these alone are trained."""
    torch.manual_seed(seed)
    options = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8.0}
    module = lora_llama3(vocab_size=VOCABULARY, **TINY_SIZES, **(options | settings))
    perturb_weights(module)
    for name, parameter in module.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    train_adapters_only(module)
    return module


def attached(teacher, module):
    teacher.attach(lambda: module)
    return teacher


@pytest.mark.parametrize("share", [0.01, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_trust_region_teacher_mixes_the_logits_of_reference_and_live(share, temperature):
    live, reference, rollouts = model(0), model(1), random_rollouts(4)
    mixed = (1 - share) * side_logits(reference, rollouts, "teacher") + share * side_logits(live, rollouts, "teacher")
    teacher = attached(TrustRegionTeacher(share), reference)
    check_student_side(live, teacher, rollouts, mixed.detach(), side_logits(live, rollouts, "student"), temperature=temperature)
    assert gradients(reference) == {}


def test_a_trust_region_teacher_beside_a_trained_live_one_uses_what_that_computes():
    """π-Distill with 0<α<1: sg T of the student half is the mixture; its live part costs no forward and takes no gradient."""
    live, reference, rollouts = model(0), model(1), random_rollouts(4)
    to_student, to_teacher = Divergence("kl_teacher_student", "student"), Divergence("kl_teacher_student", "teacher")
    calls = []
    live.layers[0].register_forward_hook(lambda *_: calls.append(1))
    teacher = attached(TrustRegionTeacher(0.3), reference)
    scores = score(live, batch_of(rollouts), ScoreRequest(True, True, divergences=(to_student, to_teacher)), teacher=teacher)
    assert len(calls) == 1
    student, own = side_logits(live, rollouts, "student"), side_logits(live, rollouts, "teacher")
    mixed = (0.7 * side_logits(reference, rollouts, "teacher") + 0.3 * own).detach()
    t, s, m = (torch.log_softmax(x, -1) for x in (own, student, mixed))
    expected = (divergence(to_student, m, s), divergence(to_teacher, t, s))
    for d, value in zip((to_student, to_teacher), expected, strict=True):
        torch.testing.assert_close(scores.divergences[d].double(), value, atol=2e-5, rtol=1e-5)
    (scores.divergences[to_student] + 2 * scores.divergences[to_teacher]).sum().backward()
    ours = gradients(live)
    live.zero_grad()
    (expected[0] + 2 * expected[1]).sum().backward()
    assert relative_difference(ours, gradients(live)) < 5e-6


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_off_teacher_is_the_model_without_its_adapters(settings):
    module, rollouts = lora_model(**settings), random_rollouts(4)
    if settings:
        for layer in module.modules():
            if hasattr(layer, "initialize_dora_magnitude"):
                layer.initialize_dora_magnitude()
    with disable_adapter(module):
        base = side_logits(module, rollouts, "teacher").detach()
    assert (base - side_logits(module, rollouts, "teacher")).abs().max() > 0.01
    student = side_logits(module, rollouts, "student")
    check_student_side(module, AdapterOffTeacher(), rollouts, base, student)
    assert set(gradients(module)) == {n for n, _ in module.named_parameters() if "lora" in n or "magnitude" in n}
    # The adapters are on again.
    torch.testing.assert_close(side_logits(module, rollouts, "student"), student)


def test_an_adapter_off_teacher_scores_one_view_and_both_trained_ones():
    module, rollouts = lora_model(), random_rollouts(3)
    with disable_adapter(module):
        base = torch.log_softmax(side_logits(module, rollouts, "teacher"), -1).detach()
    picked = targets_of(rollouts)[:, None]
    alone = score(module, batch_of(rollouts), ScoreRequest(False, False, views=("teacher",)), teacher=AdapterOffTeacher())
    torch.testing.assert_close(alone.teacher_logprobs.double(), base.gather(1, picked)[:, 0], atol=2e-5, rtol=1e-5)
    to_student = Divergence("kl_teacher_student", "student")
    both = score(module, batch_of(rollouts), ScoreRequest(True, True, divergences=(to_student,)), teacher=AdapterOffTeacher())
    student = torch.log_softmax(side_logits(module, rollouts, "student"), -1)
    torch.testing.assert_close(
        both.divergences[to_student].double(), divergence(to_student, base, student), atol=2e-5, rtol=1e-5
    )
    own = torch.log_softmax(side_logits(module, rollouts, "teacher"), -1).gather(1, picked)[:, 0]
    torch.testing.assert_close(both.teacher_logprobs.double(), own, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("teacher_size", [VOCABULARY, VOCABULARY + 14])
@pytest.mark.parametrize("student_size", [VOCABULARY, VOCABULARY + 9])
def test_padded_output_rows_on_either_side_are_cropped(student_size, teacher_size):
    """Another model, also of another width: divergences over the ids that both have, log-probs over each side's own."""
    rollouts = random_rollouts(4)
    student, other = tiny_model(student_size, seed=0), tiny_model(teacher_size, seed=1, embed_dim=32, num_layers=1)
    teacher = attached(FrozenTeacher(), other)
    logits = side_logits(other, rollouts, "teacher").detach()
    check_student_side(student, teacher, rollouts, logits, side_logits(student, rollouts, "student"))
    assert gradients(other) == {}


def test_a_mixture_of_models_with_other_padding_is_over_the_ids_of_both():
    rollouts = random_rollouts(3)
    live, reference = tiny_model(VOCABULARY + 3, seed=0), tiny_model(VOCABULARY, seed=1)
    own, first = side_logits(live, rollouts, "teacher")[:, :VOCABULARY], side_logits(reference, rollouts, "teacher")
    mixed = (0.75 * first + 0.25 * own).detach()
    teacher = attached(TrustRegionTeacher(0.25), reference)
    check_student_side(live, teacher, rollouts, mixed, side_logits(live, rollouts, "student"))


def test_a_sampled_id_that_one_side_lacks_is_impossible_there():
    rollouts = random_rollouts(2)
    rollouts[0].completion[0] = VOCABULARY + 1
    student, teacher = tiny_model(VOCABULARY + 3, seed=0), tiny_model(VOCABULARY + 3, seed=1)
    teacher.output.weight = torch.nn.Parameter(teacher.output.weight[:VOCABULARY].detach())
    scores = score(student, batch_of(rollouts), ScoreRequest(True, False), teacher=teacher)
    assert scores.teacher_logprobs[0] == -torch.inf and scores.teacher_logprobs[1:].isfinite().all()
    assert scores.student_logprobs.isfinite().all()


def test_a_live_teacher_is_no_teacher():
    module, rollouts = model(0), random_rollouts(3)
    request = ScoreRequest(True, True, divergences=DIVERGENCES)
    given, none = (score(module, batch_of(rollouts), request, teacher=t) for t in (LiveTeacher(), None))
    for d in DIVERGENCES:
        torch.testing.assert_close(given.divergences[d], none.divergences[d], atol=0, rtol=0)


def test_a_head_with_adapters_is_refused():
    module = lora_model(apply_lora_to_output=True)
    with pytest.raises(InputError, match="output layer of type LoRALinear.*apply_lora_to_output=False"):
        score(module, batch_of(random_rollouts(2)), ScoreRequest(True, False))


def test_device_of_batches_is_the_one_asked_for():
    assert batch_of(random_rollouts(2)).targets.device == CPU
