"""Test options that need less memory: an optimizer in 8 bits, one on the CPU, and offloading, which needs a GPU."""

import contextlib
import types

import pytest
import torch
from omegaconf import OmegaConf
from torchao.optim.subclass_8bit import OptimState8bit

from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.training.optimizers import cpu_offload, keep_second_moments_above_zero
from pidistill.training.update import Updates
from tests.recipes.conftest import WIDE
from tests.support.builders import CPU
from tests.support.runs import (
    assert_same_tensors,
    back_to_checkpoint,
    metrics,
    run,
    save_config,
    shell,
    small_config,
    training_state,
    tune_command,
    weights,
)

EIGHT_BITS = {"optimizer._component_": "torchao.optim.AdamW8bit"}
ON_CPU = {
    "optimizer._component_": "pidistill.training.optimizers.cpu_offload",
    "optimizer.minimal_size": 64,
    "clip_grad_norm": None,
}


def memory_run(base, folder, prepare=None, **changes):
    return run("opsd", small_config("opsd", base, folder, **WIDE, **changes), prepare)


def same_states(first, second):
    """As the rest of a training state, and of 8-bit states codes and scales."""
    assert first.keys() == second.keys() and len(first) > 5
    for name in first:
        for key, value in first[name].items():
            other = second[name][key]
            assert type(value) is type(other)
            parts = ("codes", "scale") if isinstance(value, OptimState8bit) else ()
            assert_same_tensors([getattr(value, p) for p in parts] or value, [getattr(other, p) for p in parts] or other, name)


# ------------------------------------------------------------------------------------------- 8 bits


@pytest.fixture
def eager():
    """torchao compiles its step, which takes half a minute here; the arithmetic is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_adamw_in_8_bits_is_adamw_up_to_the_rounding_of_its_states(eager, wide_base, tmp_path):
    """Its first step uses the states before they are rounded; the second those of the first."""
    recipe = memory_run(wide_base, tmp_path / "small", max_steps=2, **EIGHT_BITS)
    states = [s["exp_avg"] for s in recipe._updates.optimizer.state.values()]
    assert sum(isinstance(state, OptimState8bit) for state in states) > 5
    memory_run(wide_base, tmp_path / "full", max_steps=2)
    first = weights(wide_base.parent, wide_base.name)
    ours, theirs = weights(tmp_path / "small"), weights(tmp_path / "full")
    for name in first:
        moved = (theirs[name] - first[name]).norm()
        assert moved > 0 and (ours[name] - theirs[name]).norm() < 0.05 * moved, name
    for row, expected in zip(metrics(tmp_path / "small"), metrics(tmp_path / "full"), strict=True):
        assert row["lr"] == pytest.approx(expected["lr"], rel=1e-6) and isinstance(row["lr"], float)


def test_a_resumed_run_in_8_bits_is_the_whole_run_to_the_bit(eager, wide_base, tmp_path):
    changes = EIGHT_BITS | {"save_every_steps": 2}
    memory_run(wide_base, tmp_path / "whole", **changes)
    back_to_checkpoint(tmp_path / "whole", tmp_path / "cut")
    memory_run(wide_base, tmp_path / "cut", resume_from_checkpoint=True, **changes)
    same_states(*(training_state(tmp_path / name)["optimizer"]["state"] for name in ("whole", "cut")))
    assert_same_tensors(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert metrics(tmp_path / "whole")[-1] == metrics(tmp_path / "cut")[-1]


@pytest.mark.slow(reason="the default run has the same options on one process and without compiling")
@pytest.mark.parametrize(("processes", "replicas"), [(2, 1), (4, 2)])
def test_several_processes_in_8_bits_train_as_one_does_and_resume_to_the_bit_and_one_cannot(
    processes, replicas, eager, wide_base, tmp_path
):
    runs, replicated = {}, {"data_parallel_replicate_dim": replicas}
    for name, folder, changes in (
        ("whole", "whole", {"max_steps": 2}),
        ("first", "cut", {"max_steps": 1}),
        ("second", "cut", {"max_steps": 2, "resume_from_checkpoint": True}),
    ):
        cfg = small_config("opsd", wide_base, tmp_path / folder, **WIDE, **EIGHT_BITS, **replicated, **changes)
        runs[name] = ["opsd", str(save_config(cfg, tmp_path / f"{name}.yaml"))]
    several = str(save_config(OmegaConf.create({"runs": runs}), tmp_path / "all.yaml"))
    command = tune_command("run", "--nproc_per_node", str(processes), "tests/support/several.py", "--config", several)
    done = shell(command, timeout_s=240, TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_tensors(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    memory_run(wide_base, tmp_path / "one", max_steps=2, **EIGHT_BITS)
    first, ours, theirs = weights(wide_base.parent, wide_base.name), weights(tmp_path / "whole"), weights(tmp_path / "one")
    for name in first:
        moved = (theirs[name] - first[name]).norm()
        assert moved > 0 and (ours[name] - theirs[name]).norm() < 0.05 * moved, name
    said = f"{processes} processes' own parts of an optimizer, which AdamW8bit with 1 processes cannot take"
    with pytest.raises(InputError, match=said):
        memory_run(wide_base, tmp_path / "cut", max_steps=3, resume_from_checkpoint=True, **EIGHT_BITS)


@pytest.mark.slow(reason="the default run has the same options on one process and without compiling")
def test_the_compiled_step_is_the_eager_one(wide_base, tmp_path):
    memory_run(wide_base, tmp_path / "compiled", max_steps=2, **EIGHT_BITS)
    with torch.compiler.set_stance("force_eager"):
        memory_run(wide_base, tmp_path / "eager", max_steps=2, **EIGHT_BITS)
    one, two = weights(tmp_path / "compiled"), weights(tmp_path / "eager")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------- the optimizer on the CPU


class TorchWithoutStreams:
    """torch as torchao's CPUOffloadOptimizer uses it, with a CPU that passes for the GPU and streams that do nothing."""

    class Stream:
        def wait_stream(self, other):
            pass

        def record_event(self):
            return self

        def synchronize(self):
            pass

    cuda = types.SimpleNamespace(
        Stream=Stream, current_stream=lambda: None, stream=lambda stream: contextlib.nullcontext(), is_available=lambda: True
    )

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty_like(self, tensor, pin_memory=False, **arguments):
        return torch.empty_like(tensor, **arguments)


@pytest.fixture
def stand_in_gpu(monkeypatch):
    monkeypatch.setattr("torchao.optim.cpu_offload.torch", TorchWithoutStreams())
    monkeypatch.setattr("torchao.optim.cpu_offload.get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr("pidistill.training.optimizers.torch", TorchWithoutStreams())


def test_an_optimizer_on_the_cpu_is_the_same_and_resumes_to_the_bit(stand_in_gpu, wide_base, tmp_path):
    """Schedule, state and steps; copies between devices are stand-ins here."""
    changes = {"save_every_steps": 2}
    memory_run(wide_base, tmp_path / "gpu", clip_grad_norm=None, **changes)
    memory_run(wide_base, tmp_path / "whole", **ON_CPU, **changes)
    back_to_checkpoint(tmp_path / "whole", tmp_path / "cut")
    memory_run(wide_base, tmp_path / "cut", resume_from_checkpoint=True, **ON_CPU, **changes)
    plain, whole, cut = (weights(tmp_path / name) for name in ("gpu", "whole", "cut"))
    assert_same_tensors(whole, cut)
    for name in plain:
        torch.testing.assert_close(plain[name], whole[name], rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="1 processes' own parts of an optimizer, which AdamW with 1 processes cannot take"):
        memory_run(wide_base, tmp_path / "cut", max_steps=5, resume_from_checkpoint=True)


def test_a_skipped_steps_gradients_are_forgotten(stand_in_gpu, tmp_path):
    """Also those that are on their way to the CPU already."""
    layers = torch.nn.ModuleList([torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)])
    cfg = OmegaConf.create({"optimizer": {"_component_": ON_CPU["optimizer._component_"], "lr": 0.1, "minimal_size": 1}})
    updates = Updates(cfg, Run(CPU, torch.float32, 0, 1, 0, tmp_path), layers)
    before = layers[1].weight.detach().clone()
    layers[1](torch.ones(16)).sum().backward()
    assert not updates.step(float("nan"), 5, lambda path: None, 1).applied
    layers[0](torch.ones(16)).sum().backward()
    assert updates.step(1.0, 5, lambda path: None, 2).applied
    assert torch.equal(layers[1].weight, before)


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (ON_CPU, "cpu_offload moves states from a GPU to the CPU, and this machine has no CUDA device; set optimizer._comp"),
        ({"fsdp_cpu_offload": True}, "fsdp_cpu_offload=True moves memory from a GPU to the CPU, and device is cpu; set fsdp"),
        ({"enable_activation_offloading": True}, "enable_activation_offloading=True moves memory .* device is cpu"),
    ],
)
def test_what_needs_a_gpu_is_refused_on_a_cpu(changes, message, wide_base, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=message):
        memory_run(wide_base, tmp_path, **changes)


def test_states_in_8_bits_are_guarded_on_the_cpu_too(stand_in_gpu):
    weights = [torch.nn.Parameter(torch.ones(2, 64)), torch.nn.Parameter(torch.ones(2))]
    outer = cpu_offload(weights, "torchao.optim.AdamW8bit", lr=0.1, minimal_size=64)
    keep_second_moments_above_zero(outer)
    assert all(inner._optimizer_step_post_hooks for inner in (*outer.optim_dict.values(), outer.d_opt))


def test_states_in_fp8_are_refused_on_the_cpu_too(stand_in_gpu, wide_base, tmp_path):
    with pytest.raises(InputError, match="AdamWFp8 rounds small .*; set optimizer.optimizer=torchao.optim.AdamW8bit"):
        memory_run(wide_base, tmp_path, **(ON_CPU | {"optimizer.optimizer": "torchao.optim.AdamWFp8"}))


def test_clipping_that_would_have_no_effect_is_refused(stand_in_gpu, wide_base, tmp_path):
    with pytest.raises(InputError, match="clip_grad_norm=1 has no effect on .*; set clip_grad_norm=null"):
        memory_run(wide_base, tmp_path, **(ON_CPU | {"clip_grad_norm": 1.0}))
