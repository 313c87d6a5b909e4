"""Test weights in fp32 multiplied in bf16, against fp32 throughout and bf16 throughout, on a small model."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor
from torchtune.modules import RMSNorm

from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.models import precision
from pidistill.models.precision import (
    add_up_norms_in_fp32,
    compute_dtype_of,
    multiply_head,
    own_wide_head,
    spread_within_rounding,
    widen_head,
)
from pidistill.models.protocol import head_module
from pidistill.rollouts import TorchtuneSampler
from pidistill.rollouts.vllm_sampler import whole_weights
from pidistill.scoring.score import score, student_nll
from pidistill.teachers import EMATeacher, FrozenTeacher, Teacher, TrustRegionTeacher
from pidistill.testing import TINY_SIZES, tiny_model
from pidistill.training.load import load_model
from pidistill.training.start import start
from pidistill.types import Divergence, ScoreRequest
from tests.support.builders import CPU, VOCABULARY, batch_of, random_rollouts

NODE = {"_component_": "torchtune.models.llama3.llama3", "vocab_size": VOCABULARY, **TINY_SIZES}
LORA = {
    **NODE,
    "_component_": "torchtune.models.llama3.lora_llama3",
    "lora_attn_modules": ["q_proj", "v_proj"],
    "lora_rank": 4,
    "lora_alpha": 8.0,
}
DTYPES = {"fp32": (torch.float32, None), "mixed": (torch.float32, torch.bfloat16), "bf16": (torch.bfloat16, None)}
STUDENT = ScoreRequest(student_grad=True, teacher_grad=False, views=("student",), entropy=False)


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def load(kind, node=NODE, trained=True, averaged=False, file_dtype=torch.float32, **settings):
    dtype, compute_dtype = DTYPES[kind]
    run = Run(CPU, dtype, 0, 1, 0, Path("unused"), None, compute_dtype)
    weights = {name: weight.to(file_dtype) for name, weight in tiny_model(VOCABULARY).state_dict().items()}
    return load_model(OmegaConf.create(settings), run, OmegaConf.create(node), weights, trained=trained, averaged=averaged)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double()


def flat(tensors):
    return torch.cat([whole(tensor).flatten() for tensor in tensors])


def backward(model, batches):
    """The gradient of the mean loss of supervised training, micro-batch by micro-batch."""
    tokens = sum(batch.targets.numel() for batch in batches)
    for batch in batches:
        scores = score(model, batch, STUDENT, loss=student_nll)
        (student_nll(batch, scores).sum() / tokens).backward()


def batches(count=3):
    return [batch_of(random_rollouts(8, seed=seed)) for seed in range(count)]


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_one_steps_gradient_is_that_of_fp32_up_to_bf16s_rounding():
    gradients = {}
    for kind in DTYPES:
        model = load(kind)
        backward(model, batches())
        assert {p.grad.dtype for p in model.parameters()} == {DTYPES[kind][0]}
        gradients[kind] = flat(p.grad for p in model.parameters())
    assert 0.999 < cosine(gradients["mixed"], gradients["fp32"]) < 1 - 1e-9
    assert gradients["mixed"].norm() / gradients["fp32"].norm() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", ["kl_teacher_student", "kl_student_teacher"])
def test_a_divergences_gradient_on_both_sides_is_that_of_fp32_up_to_bf16s_rounding(name):
    divergence, gradients = Divergence(name, grad="both"), []
    request = ScoreRequest(student_grad=True, teacher_grad=True, divergences=(divergence,), entropy=False)
    for kind in ("mixed", "fp32"):
        model, batch = load(kind), batch_of(random_rollouts(24))
        score(model, batch, request).divergences[divergence].mean().backward()
        gradients.append(flat(p.grad for p in model.parameters()))
    assert 0.99 < cosine(*gradients) < 1 - 1e-9
    assert gradients[0].norm() / gradients[1].norm() == pytest.approx(1.0, abs=0.03)


def test_gradients_of_micro_batches_add_up_in_fp32():
    """A micro-batch that counts 2⁻¹² of the others' would be lost in a bf16 sum."""
    model, (batch,) = load("mixed"), batches(1)
    for factor in (1.0, 2.0**-12):
        (factor * student_nll(batch, score(model, batch, STUDENT)).mean()).backward()
    both = flat(p.grad for p in model.parameters())
    model.zero_grad()
    student_nll(batch, score(model, batch, STUDENT)).mean().backward()
    alone = flat(p.grad for p in model.parameters())
    torch.testing.assert_close(both, alone * (1 + 2.0**-12), rtol=1e-6, atol=1e-12)


def displacement(kind, steps):
    model, fixed = load(kind), batches()
    before = flat(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6, weight_decay=0.0)
    for _ in range(steps):
        backward(model, fixed)
        optimizer.step()
        optimizer.zero_grad()
    return flat(model.parameters()) - before


@pytest.mark.parametrize(
    "steps", [10, pytest.param(50, marks=pytest.mark.slow(reason="10 steps are compared in the default run"))]
)
def test_small_steps_move_the_weights_as_in_fp32_where_bf16_loses_most_of_them(steps):
    moved = {kind: displacement(kind, steps) for kind in DTYPES}
    assert cosine(moved["mixed"], moved["fp32"]) >= 0.99
    assert moved["mixed"].norm() / moved["fp32"].norm() == pytest.approx(1.0, abs=0.02)
    most = (moved["bf16"] == 0).double().mean()
    assert most > 0.9, f"{most:.3f} of the weights did not move in bf16"


def test_small_steps_from_a_bf16_file_move_the_bf16_copies_as_far_as_the_weights():
    """In the middle between two borders of rounding a weight's copy would not move at all."""
    model, fixed = load("mixed", file_dtype=torch.bfloat16), batches()
    before = [flat(model.parameters()), flat(p.bfloat16() for p in model.parameters())]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6, weight_decay=0.0)
    for _ in range(5):
        backward(model, fixed)
        optimizer.step()
        optimizer.zero_grad()
    after = [flat(model.parameters()), flat(p.bfloat16() for p in model.parameters())]
    weights, copies = (a - b for a, b in zip(after, before, strict=True))
    assert float(copies @ weights / (weights @ weights)) == pytest.approx(1.0, abs=0.15)


def test_weights_of_a_bf16_file_are_spread_evenly_over_the_values_that_round_to_them():
    torch.manual_seed(0)
    weight = torch.cat([0.1 * torch.randn(50_000), torch.zeros(100), 2.0 ** torch.arange(-20, 20)]).bfloat16()
    spread = spread_within_rounding("a.weight", weight)
    assert torch.equal(spread.bfloat16(), weight) and not spread[weight == 0].any()
    inside = weight.float().abs().frexp().mantissa[:50_000].bfloat16() != 0.5  # below a power of two the bits are finer
    units = torch.ldexp(spread - weight.float(), 8 - weight.float().frexp().exponent)[:50_000][inside]
    assert torch.histc(units, bins=10, min=-0.5, max=0.5).div(len(units)).sub(0.1).abs().max() < 0.01
    assert torch.equal(spread, spread_within_rounding("a.weight", weight))
    assert not torch.equal(spread, spread_within_rounding("b.weight", weight))


def test_only_weights_that_mixed_precision_trains_or_averages_are_spread():
    file = {name: weight.bfloat16() for name, weight in tiny_model(VOCABULARY).state_dict().items()}
    found = {
        kind: load(kind, file_dtype=torch.bfloat16, **more).state_dict()
        for kind, more in [("fp32", {}), ("mixed", {}), ("bf16", {"trained": False})]
    }
    average = load("mixed", file_dtype=torch.bfloat16, trained=False, averaged=True).state_dict()
    for name, weight in file.items():
        assert torch.equal(found["fp32"][name], weight.float()) and torch.equal(found["bf16"][name], weight)
        assert torch.equal(whole(found["mixed"][name]).bfloat16(), weight)
        assert torch.equal(whole(found["mixed"][name]), whole(average[name]))
    assert sum(not torch.equal(whole(found["mixed"][name]), weight.double()) for name, weight in file.items()) > 5
    exact = load("mixed").state_dict()
    assert all(torch.equal(whole(exact[name]), w.double()) for name, w in tiny_model(VOCABULARY).state_dict().items())


def test_one_process_multiplies_with_the_head_that_it_trains_where_products_round_it(monkeypatch):
    """Where they do not, its copy has the rounding."""
    model = load("mixed", file_dtype=torch.bfloat16)
    head = head_module(model)
    monkeypatch.setattr(precision, "_rounds_factors", lambda: False)
    assert own_wide_head(model, head) is None
    copied = [score(model, batches(1)[0], STUDENT).student_logprobs.detach(), *sampled_logprobs(model)]
    monkeypatch.setattr(precision, "_rounds_factors", lambda: True)
    assert own_wide_head(model, head).data_ptr() == head.weight.to_local().data_ptr()
    assert [own_wide_head(m, head_module(m)) for m in (load("fp32"), load("bf16"), load("mixed", LORA))] == [None] * 3
    # A product that rounds, for a CPU that has none; then both are the same numbers.
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **more: multiply(a, b.bfloat16().to(b.dtype), **more))
    ours = [score(model, batches(1)[0], STUDENT).student_logprobs.detach(), *sampled_logprobs(model)]
    assert all(torch.equal(a, b) for a, b in zip(ours, copied, strict=True))


def sampled_logprobs(model):
    return [torch.tensor(found.logprobs) for found in sample(model, [[1, 2], [3, 4, 5]], max_new_tokens=8)]


@pytest.mark.parametrize("node", [NODE, LORA], ids=["full", "lora"])
def test_the_samplers_logprobs_are_the_trainers(node):
    model, asked = load("mixed", node), random_rollouts(32, seed=3)
    samples = sample(model, [rollout.prompts.student for rollout in asked], max_new_tokens=24, stop_ids=frozenset({7}))
    rollouts = [
        replace(rollout, completion=s.tokens, policy_mask=s.policy_mask, sampled_logprobs=s.logprobs)
        for rollout, s in zip(asked, samples, strict=True)
    ]
    ours = score(model, batch_of(rollouts), STUDENT).student_logprobs
    theirs = torch.tensor([logprob for s in samples for logprob in s.logprobs])
    assert len(theirs) > 300 and 0 < (ours - theirs).abs().mean() < 0.02


def sample(model, prompts, max_new_tokens=3, stop_ids=frozenset()):
    return TorchtuneSampler(max_new_tokens=max_new_tokens).sample(
        model,
        prompts,
        group_size=1,
        seeds=range(len(prompts)),
        stop_ids=stop_ids,
        pad_id=0,
        on_turn_end=lambda row, ids: None,
    )


def test_the_model_is_whole_in_bf16_while_it_samples_and_in_fp32_afterwards():
    seen = []
    model = load("mixed")
    model.layers[0].attn.q_proj.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    sample(model, [[1, 2]])
    assert {(weight.dtype, isinstance(weight, DTensor)) for weight in seen} == {(torch.bfloat16, False)}
    assert {weight.data_ptr() for weight in seen} == {seen[0].data_ptr()}  # gathered once
    assert {(p.dtype, isinstance(p, DTensor)) for p in model.parameters()} == {(torch.float32, True)}


# ---------------------------------------------------------------------------------------------- which weights have which dtype


def dtypes(model, trained):
    return {p.dtype for p in model.parameters() if p.requires_grad == trained}


def test_adapters_are_in_fp32_and_their_base_in_bf16():
    model = load("mixed", LORA)
    assert (dtypes(model, True), dtypes(model, False)) == ({torch.float32}, {torch.bfloat16})
    backward(model, batches(1))
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert compute_dtype_of(model) == torch.bfloat16


def test_adapters_get_the_gradient_of_fp32():
    gradients = []
    for kind in ("mixed", "fp32"):
        model = load(kind, LORA)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_b" in name:
                    local = p.to_local() if isinstance(p, DTensor) else p
                    local.copy_(torch.linspace(-0.1, 0.1, local.numel()).view_as(local))
        backward(model, batches())
        gradients.append(flat(p.grad for p in model.parameters() if p.requires_grad))
    assert cosine(*gradients) > 0.999


@pytest.mark.parametrize("teacher", [FrozenTeacher(), TrustRegionTeacher(0.1), EMATeacher(0.3)], ids=lambda t: type(t).__name__)
def test_a_teacher_multiplies_in_bf16_and_keeps_an_average_in_fp32(teacher: Teacher):
    seen = []

    def load_copy():
        module = load("mixed", trained=False, averaged=teacher.averages)
        module.layers[0].mlp.w1.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.dtype))
        return module

    teacher.attach(load_copy)
    module, model, (batch,) = teacher.module, load("mixed"), batches(1)
    stored = torch.float32 if teacher.averages else torch.bfloat16
    assert {p.dtype for p in module.parameters()} == {stored}
    request = ScoreRequest(student_grad=False, teacher_grad=False, entropy=False)
    before = score(model, batch, request, teacher=teacher)
    assert set(seen) == {torch.bfloat16}
    step_of_five_millionths(model)
    teacher.update(model)
    after = score(model, batch, request, teacher=teacher)
    assert after.teacher_logprobs.dtype == torch.float32
    expected = flat(tiny_model(VOCABULARY).parameters())
    if teacher.averages:
        expected = torch.lerp(expected, flat(model.parameters()), 0.3)
        torch.testing.assert_close(flat(teacher.state_dict().values()), expected, rtol=1e-6, atol=1e-9)
        assert (expected - flat(tiny_model(VOCABULARY).parameters())).abs().max() < 1e-5
    elif isinstance(teacher, FrozenTeacher):
        torch.testing.assert_close(before.teacher_logprobs, after.teacher_logprobs, rtol=0, atol=0)


@torch.no_grad()
def step_of_five_millionths(model):
    for p in model.parameters():
        p.add_(5e-6)


def test_a_frozen_teacher_that_equals_the_student_is_at_distance_zero():
    """Both multiply with the same bf16 weights, so that neither a divergence nor a gradient of rounding noise arises."""
    teacher, model = FrozenTeacher(), load("mixed")
    teacher.attach(lambda: load("mixed", trained=False))
    batch = batch_of(random_rollouts(6, with_pi=False))
    scores = score(model, batch, ScoreRequest(student_grad=False, teacher_grad=False, entropy=False), teacher=teacher)
    assert torch.equal(scores.student_logprobs, scores.teacher_logprobs)


@pytest.mark.parametrize("node", [NODE, LORA], ids=["full", "lora"])
def test_vllm_gets_whole_weights_in_bf16_and_adapters_merged_before_they_are_rounded(node):
    model = load("mixed", node)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_b" in name:
                p.to_local().fill_(0.01)
    found = whole_weights(model)
    assert {(t.dtype, isinstance(t, DTensor)) for t in found.values()} == {(torch.bfloat16, False)}
    initial, name = tiny_model(VOCABULARY).state_dict(), "layers.0.attn.q_proj.weight"
    assert found.keys() == initial.keys()
    expected = initial[name].bfloat16()
    if node is LORA:
        a, b = (whole(model.get_parameter(f"layers.0.attn.q_proj.lora_{part}.weight")).float() for part in "ab")
        expected = (expected.float() + 8.0 / 4 * (b @ a)).bfloat16()
        assert not torch.equal(expected, initial[name].bfloat16())
    torch.testing.assert_close(found[name].float(), expected.float(), rtol=2**-7, atol=1e-6)


# ---------------------------------------------------------------------------------------------- logits


def test_logits_from_bf16_factors_are_not_rounded_to_bf16():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (5, 90))
    exact = hidden.double() @ weight.double().T
    logits = multiply_head(hidden, widen_head(weight))
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-5 < 1e-2 < ((hidden @ weight.T) - exact).abs().max()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_bf16_rounds_once_and_adds_up_in_fp32(scale_dtype, recwarn):
    """Against float64 with the same bf16 inputs: values and gradients are as near as one rounding; bf16 sums are not."""
    generator = torch.Generator().manual_seed(0)
    x = (1 + 0.1 * torch.randn(3, 4096, generator=generator)).bfloat16()
    outer = torch.randn(3, 4096, generator=generator).bfloat16()
    norm = RMSNorm(4096)
    norm.scale = torch.nn.Parameter((1 + 0.1 * torch.randn(4096, generator=generator)).to(scale_dtype))
    add_up_norms_in_fp32(norm)
    found, exact = [], []
    for results, dtype, forward in ((found, None, norm), (exact, torch.float64, None)):
        given, scale = (x, norm.scale) if dtype is None else (x.to(dtype), norm.scale.detach().to(dtype).requires_grad_())
        given = given.detach().requires_grad_()
        out = norm(given) if forward else torch.nn.functional.rms_norm(given, (4096,), scale, norm.eps)
        results += [out, *torch.autograd.grad(out, (given, scale), outer.to(out.dtype))]
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).abs().max() <= 2**-8 * theirs.abs().max()
    summed = functools.reduce(torch.add, x.square().unbind(-1)).double()
    assert (summed / x.double().square().sum(-1) - 1).abs().max() > 0.1, "sums in bf16 would have passed"
    assert not [w for w in recwarn if "Mismatch dtype" in str(w.message)]


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"dtype": "bf16", "compute_dtype": "fp32"},
            "compute_dtype=fp32 does not work with dtype=bf16; mixed precision is dty",
        ),
        ({"dtype": "fp32", "compute_dtype": "fp16"}, "compute_dtype=fp16 "),
        ({"compute_dtype": "int8"}, "compute_dtype=int8 is unknown; choose fp32 or bf16"),
        (
            {"compute_dtype": "bf16", "optimizer": {"_component_": "pidistill.training.optimizers.cpu_offload"}},
            "cpu_offload does not work with compute_dtype=bf16, .* set fsdp_cpu_offload=True",
        ),
    ],
)
def test_what_mixed_precision_does_not_work_with_is_one_sentence(changes, sentence, tmp_path):
    dist.destroy_process_group()
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "device": "cpu", **changes})
    with pytest.raises(InputError, match=sentence):
        start(cfg, frozenset(cfg), ())


def test_compute_dtype_of_the_weights_own_dtype_is_no_mixed_precision(tmp_path):
    dist.destroy_process_group()
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "device": "cpu", "dtype": "bf16", "compute_dtype": "bf16"})
    run = start(cfg, frozenset(cfg), ())
    assert not run.is_mixed and run.forward_dtype == torch.bfloat16
