"""Test whose weights teach: the live ones, the first ones, or a moving average that is exactly the formula's."""

import copy
import dataclasses
import gc

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torchtune import modules, training
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_params

from pidistill.errors import InputError
from pidistill.models.adapters import merged, train_adapters_only, with_initial_adapters
from pidistill.scoring.score import score
from pidistill.teachers import (
    AdapterOffTeacher,
    EMATeacher,
    FrozenTeacher,
    LiveTeacher,
    SnapshotTeacher,
    Teacher,
    TrustRegionTeacher,
)
from pidistill.testing import TINY_SIZES
from pidistill.types import Divergence, ScoreRequest
from tests.support.builders import VOCABULARY, batch_of, model, random_rollouts
from tests.support.runs import MODEL, metrics, quick_setup, run, small_config
from tests.support.tiny_base import make_base

TOKENS = torch.arange(12).view(2, 6)


def step(trained, scale=0.1, seed=0):
    """Move every weight by a random amount, as an optimiser step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def state(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def slow_average(initial, history, rate):
    """(1−r)^n·φ₀ + Σ_k r·(1−r)^(n−k)·θ_k, in float64."""
    n = len(history)
    average = {name: (1 - rate) ** n * value.double() for name, value in initial.items()}
    for k, weights in enumerate(history, start=1):
        for name, value in weights.items():
            average[name] += rate * (1 - rate) ** (n - k) * value.double()
    return average


def attached(teacher, initial):
    teacher.attach(lambda: copy.deepcopy(initial))
    return teacher


@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_the_moving_average_is_the_formula_after_any_number_of_steps(rate):
    trained = model()
    teacher, initial, history = attached(EMATeacher(rate), trained), state(trained), []
    for seed in range(6):
        step(trained, seed=seed)
        teacher.update(trained)
        history.append(state(trained))
        expected = slow_average(initial, history, rate)
        for name, parameter in teacher.module.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_before_the_first_step_the_average_is_the_initial_weights():
    trained = model()
    teacher = attached(EMATeacher(), trained)
    torch.testing.assert_close(teacher.module(TOKENS), trained.eval()(TOKENS), rtol=0, atol=0)


def test_a_small_rate_is_not_rounded_away_in_bf16():
    """One step of 1% of a weight's last bit moves no bf16 weight; a hundred of them must."""
    trained = model().to(torch.bfloat16)
    teacher, initial = attached(EMATeacher(0.01), trained), state(trained)
    step(trained, scale=0.05)
    history = []
    for _ in range(100):
        teacher.update(trained)
        history.append(state(trained))
    expected = slow_average(initial, history, 0.01)
    moved = 0
    for name, parameter in teacher.module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(parameter.float(), expected[name].float(), rtol=2**-8, atol=1e-6, msg=name)
        moved += (parameter != initial[name]).sum().item()
    assert moved > 0.5 * sum(p.numel() for p in trained.parameters())


def test_the_average_comes_back_from_its_state():
    trained = model()
    first = attached(EMATeacher(0.3), trained)
    for seed in range(3):
        step(trained, seed=seed)
        first.update(trained)
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = attached(EMATeacher(0.3), model(seed=5))
    second.load_state_dict(saved)
    step(trained, seed=9)
    for teacher in (first, second):
        teacher.update(trained)
    assert state(first.module).keys() == saved.keys()
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True))


def test_the_state_of_a_bf16_teacher_keeps_its_fp32_average():
    trained = model().to(torch.bfloat16)
    first = attached(EMATeacher(0.01), trained)
    step(trained, scale=0.05)
    for _ in range(3):
        first.update(trained)
    second = attached(EMATeacher(0.01), model().to(torch.bfloat16))
    second.load_state_dict(first.state_dict())
    for name, average in second.state_dict().items():
        assert average.dtype == torch.float32
        assert torch.equal(average, first.state_dict()[name])


def test_activation_checkpointing_of_the_trained_model_does_not_hide_its_weights():
    plain, wrapped = model(), model()
    training.set_activation_checkpointing(wrapped, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    teachers = [attached(EMATeacher(0.5), model()) for _ in range(2)]
    for trained, teacher in zip((plain, wrapped), teachers, strict=True):
        step(trained)
        teacher.update(trained)
    assert all(torch.equal(a, b) for a, b in zip(*(t.module.parameters() for t in teachers), strict=True))


def test_a_snapshot_in_mixed_precision_with_one_process_is_the_trained_weights_rounded(tmp_path):
    """The trained model is sharded over one process then, and the teacher is not."""
    teacher = {"_component_": "pidistill.teachers.SnapshotTeacher", "sync_steps": 1}
    changes = {"compute_dtype": "bf16", "teacher": teacher, "max_steps": 2}
    with quick_setup():
        recipe = run("rlsd", small_config("rlsd", make_base(tmp_path / "base", MODEL), tmp_path / "run", **changes))
    copied, trained = dict(recipe._teacher.module.named_parameters()), dict(recipe._model.named_parameters())
    assert all(isinstance(weight, DTensor) for weight in trained.values()) and copied.keys() == trained.keys()
    assert all(torch.equal(copied[name], weight.full_tensor().bfloat16()) for name, weight in trained.items())
    assert all(row["grad_norm"] > 0 for row in metrics(tmp_path / "run"))
    fresh = SnapshotTeacher(sync_steps=1)
    fresh.attach(lambda: copy.deepcopy(recipe._teacher.module).requires_grad_())
    state = {name: torch.zeros_like(value) for name, value in recipe._teacher.state_dict().items()}
    fresh.load_state_dict(state)
    fresh.update(recipe._model)
    assert all(torch.equal(fresh.module.get_parameter(name), weight) for name, weight in copied.items())


@pytest.mark.parametrize("teacher", [FrozenTeacher(), EMATeacher(0.5), TrustRegionTeacher()], ids=["frozen", "ema", "region"])
def test_a_teacher_with_weights_of_its_own_takes_no_gradient_and_shares_nothing(teacher):
    trained = model()
    attached(teacher, trained)
    assert not teacher.live and teacher.own_weights and teacher.module is not trained
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert not teacher.module.training
    mse_loss(trained(TOKENS), teacher.module(TOKENS) + 1).backward()
    assert all(parameter.grad is None for parameter in teacher.module.parameters())
    shared = {p.data_ptr() for p in trained.parameters()} & {p.data_ptr() for p in teacher.module.parameters()}
    assert not shared


@pytest.mark.parametrize("kind", [FrozenTeacher, TrustRegionTeacher])
def test_a_frozen_teacher_never_changes_and_has_no_state(kind):
    trained = model()
    teacher, before = attached(kind(), trained), state(trained)
    for seed in range(3):
        step(trained, seed=seed)
        teacher.update(trained)
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.module.named_parameters())
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trained.named_parameters())
    assert teacher.state_dict() == {}
    teacher.load_state_dict({})


def test_a_live_teacher_is_the_trained_model():
    teacher = LiveTeacher()
    teacher.attach(lambda: pytest.fail("a live teacher loads no weights"))
    teacher.update(model())
    teacher.load_state_dict({})
    assert teacher.live and not teacher.own_weights and teacher.state_dict() == {}


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1])
def test_a_rate_outside_its_range_is_refused(rate):
    with pytest.raises(InputError, match=rf"teacher.rate={rate} must lie in \(0, 1\]"):
        EMATeacher(rate)


def test_every_teacher_has_the_protocol_and_shares_that_sum_to_one():
    trained = model()
    for teacher in (LiveTeacher(), FrozenTeacher(), EMATeacher(), TrustRegionTeacher(0.3), AdapterOffTeacher()):
        assert isinstance(teacher, Teacher)
        attached(teacher, trained)
        assert sum(part.share for part in teacher.mixture(trained)) == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------ weights to sample with


def lora(seed=0, trained=True, **settings):
    """A LoRA model with adapters away from their start (B = 0) where ``trained``."""
    torch.manual_seed(seed)
    options = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8.0} | settings
    module = lora_llama3(vocab_size=VOCABULARY, **TINY_SIZES, **options)
    module.load_state_dict(with_initial_adapters(module, model(seed).state_dict(), seed))
    for name, parameter in module.named_parameters():
        if trained and "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    train_adapters_only(module)
    return module


def test_live_frozen_and_averaged_weights_sample():
    trained = model()
    with LiveTeacher().sampling_weights(trained) as weights:
        assert weights is trained
    for teacher in (FrozenTeacher(), EMATeacher(0.5)):
        with attached(teacher, trained).sampling_weights(trained) as weights:
            assert teacher.can_sample and weights is teacher.module


def test_adapters_are_off_inside_and_on_outside():
    trained = lora()
    teacher, on = AdapterOffTeacher(), trained(TOKENS)
    with teacher.sampling_weights(trained) as weights:
        assert weights is trained
        torch.testing.assert_close(weights(TOKENS), model()(TOKENS), rtol=0, atol=0)
    torch.testing.assert_close(trained(TOKENS), on, rtol=0, atol=0)
    assert (on - model()(TOKENS)).abs().max() > 0.01
    assert not teacher.live and not teacher.own_weights and teacher.state_dict() == {}


def test_adapters_are_on_again_after_an_error():
    trained = lora()
    on = trained(TOKENS)
    with pytest.raises(KeyError), AdapterOffTeacher().sampling_weights(trained):
        raise KeyError
    torch.testing.assert_close(trained(TOKENS), on, rtol=0, atol=0)


def test_a_model_without_adapters_has_none_to_switch_off():
    with (
        pytest.raises(InputError, match="without its LoRA adapters, and the model has none; set `model`"),
        AdapterOffTeacher().sampling_weights(model()),
    ):
        pass


def test_a_mixture_cannot_sample():
    teacher = attached(TrustRegionTeacher(), model())
    assert not teacher.can_sample
    with pytest.raises(InputError, match="cannot sample; choose another teacher"):
        teacher.sampling_weights(model())


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(InputError, match=rf"teacher.live_share={share} must lie in \(0, 1\)"):
        TrustRegionTeacher(share)


# ------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"apply_lora_to_mlp": True}], ids=["lora", "dora", "mlp"])
def test_new_adapters_change_nothing_and_depend_on_the_seed_alone(settings):
    first, second, other = (lora(trained=False, **settings) for _ in range(3))
    torch.testing.assert_close(first(TOKENS), model()(TOKENS), rtol=1e-5, atol=1e-5)
    other.load_state_dict(with_initial_adapters(other, model().state_dict(), seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merged_weights_are_the_model_in_its_bases_format(settings):
    trained = lora(**settings)
    before, weights = state(trained), merged(trained, trained.state_dict())
    plain = model(seed=3)
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(TOKENS), trained(TOKENS), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained.named_parameters())
    unchanged = model().state_dict()
    assert merged(model(), unchanged) is unchanged


def test_only_adapters_are_averaged():
    trained = lora(trained=False)
    teacher, initial, history = attached(EMATeacher(0.3), trained), state(trained), []
    assert set(teacher.state_dict()) == set(get_adapter_params(trained))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for parameter in get_adapter_params(trained).values():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        teacher.update(trained)
        history.append(state(trained))
    expected = slow_average(initial, history, 0.3)
    for name, parameter in teacher.module.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


# ------------------------------------------------------------------------------------------- hidden states read before


def frozen_with_memory(gib: float) -> FrozenTeacher:
    teacher = FrozenTeacher(cache_gib=gib)
    teacher.attach(lambda: model(7))
    return teacher


def reads(teacher: FrozenTeacher) -> list:
    """A list that grows with every forward of the teacher."""
    seen: list = []
    teacher.module.register_forward_pre_hook(lambda *_: seen.append(None))
    return seen


DISTIL = ScoreRequest(student_grad=True, teacher_grad=False, divergences=(Divergence("kl_teacher_student", "student"),))


def test_a_rollout_is_read_once_however_often_it_is_scored():
    teacher, trained, rollouts = frozen_with_memory(1.0), model(0), random_rollouts(6)
    seen, first = reads(teacher), score(trained, batch_of(rollouts), DISTIL, teacher=teacher)
    again = score(trained, batch_of([dataclasses.replace(r, group=9) for r in rollouts]), DISTIL, teacher=teacher)
    assert len(seen) == 1
    assert torch.equal(first.teacher_logprobs, again.teacher_logprobs)
    assert all(torch.equal(a, b) for a, b in zip(first.divergences.values(), again.divergences.values(), strict=True))
    others = [rollouts[i] for i in (5, 0, 3)]
    expected = score(trained, batch_of(others), DISTIL, teacher=frozen_with_memory(0.0))
    other = score(trained, batch_of(others), DISTIL, teacher=teacher)
    assert len(seen) == 1
    torch.testing.assert_close(other.teacher_logprobs, expected.teacher_logprobs, rtol=1e-5, atol=1e-5)
    score(trained, batch_of([*others, *random_rollouts(1, seed=4)]), DISTIL, teacher=teacher)
    assert len(seen) == 2
    score(trained, batch_of([]), DISTIL, teacher=teacher)
    assert len(seen) == 2


def test_what_does_not_fit_is_not_kept_and_what_is_kept_goes_with_its_rollout():
    rollouts = random_rollouts(6)
    bytes_each = [r.policy_tokens * 64 * 4 for r in rollouts]
    teacher = frozen_with_memory(sum(bytes_each[:3]) / 2**30)
    seen = reads(teacher)
    for _ in range(2):
        score(model(0), batch_of(rollouts), DISTIL, teacher=teacher)
    assert len(seen) == 2
    kept = teacher._memory._kept
    assert 1 <= len(kept) < 6 and sum(h.nbytes for h in kept.values()) <= sum(bytes_each[:3])
    del rollouts
    gc.collect()
    assert len(kept) == 0
    with pytest.raises(InputError, match="teacher.cache_gib=-1 must be a number of at least 0"):
        FrozenTeacher(cache_gib=-1)


def test_a_teacher_whose_weights_change_keeps_no_log_probs():
    moving = EMATeacher(rate=0.5)
    moving.attach(lambda: model(7))
    assert [part.memory for part in moving.mixture(model(0))] == [None]
