"""Test optimizer states: in 8 bits after a gradient of 0, which torchao's own rounding turns into a leap, and resumed ones."""

import copy
import functools
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8
from torchao.optim.subclass_8bit import get_qmap_unsigned

from pidistill.components import resolve
from pidistill.errors import InputError
from pidistill.training.optimizers import (
    cpu_offload,
    keep_second_moments_above_zero,
    kernel_arguments,
    optimizer_state,
    restore_optimizer,
    settings,
    use_settings,
)


def steps(optimizer_class, guarded: bool) -> torch.Tensor:
    """What two steps at lr 0.01 add to a matrix; half of its rows have no gradient in the second, as absent tokens'."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(32, 256, generator=generator)
    second = first.clone()
    second[::2] = 0.0
    parameter = torch.nn.Parameter(torch.zeros(32, 256))
    optimizer = optimizer_class([parameter], lr=0.01, weight_decay=0.0)
    if guarded:
        keep_second_moments_above_zero(optimizer)
    with torch.compiler.set_stance("force_eager"):
        for gradient in (first, second):
            parameter.grad = gradient.clone()
            optimizer.step()
    return parameter.detach()


def test_a_gradient_of_zero_makes_no_leap():
    exact = steps(torch.optim.AdamW, guarded=False)
    assert (steps(AdamW8bit, guarded=False) - exact).abs().max() > 10.0  # what the guard is for
    guarded = steps(AdamW8bit, guarded=True)
    assert guarded.abs().max() < 0.05
    assert (guarded - exact).norm() < 0.1 * exact.norm()


def test_the_code_0_alone_is_a_second_moment_of_0():
    codes = torch.tensor(get_qmap_unsigned())
    assert codes[0] == 0.0 and bool((codes.diff() > 0).all())


def test_4_bit_states_make_no_leap_and_fp8_ones_are_refused():
    assert steps(AdamW4bit, guarded=True).abs().max() < 0.05
    assert steps(AdamWFp8, guarded=False).abs().max() > 10.0
    with pytest.raises(InputError, match="AdamWFp8 rounds small second moments to 0, .* set optimizer._component_=torchao"):
        steps(AdamWFp8, guarded=True)


def test_other_optimizers_are_left_alone():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    keep_second_moments_above_zero(optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_another_share_of_the_weights_than_the_states_are_of_is_refused():
    """As after a change of data_parallel_replicate_dim, with as many processes as before."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        state = optimizer_state(*sharded_after_a_step(rows=64), is_main=True)
        with pytest.raises(InputError, match="another share of AdamW8bit.s states .* with the data_parallel_replicate_dim"):
            restore_optimizer(*sharded_after_a_step(rows=32), state, "AdamW8bit")
        restore_optimizer(*sharded_after_a_step(rows=64), state, "AdamW8bit")
    finally:
        dist.destroy_process_group()


def sharded_after_a_step(rows: int) -> tuple[torch.nn.Module, AdamW8bit]:
    shard = functools.partial(distribute_tensor, device_mesh=init_device_mesh("cpu", (1,)), placements=[Shard(0)])
    model = torch.nn.Linear(256, rows, bias=False)
    model.weight = torch.nn.Parameter(shard(model.weight.detach()))
    optimizer = AdamW8bit(model.parameters(), lr=0.01)
    model.weight.grad = shard(torch.ones(rows, 256))
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    return model, optimizer


def test_gradients_that_are_freed_before_they_are_added_up_are_refused():
    with pytest.raises(InputError, match="optimizer.offload_gradients=True frees .*; set optimizer.offload_gradients=False"):
        cpu_offload([torch.nn.Parameter(torch.ones(2))], lr=0.1, offload_gradients=True)


# ---------------------------------------------------------------------------------------------- states that do not exist yet


@pytest.mark.parametrize("processes", [1, 2])
def test_states_that_do_not_exist_yet_are_made_neither_by_a_save_nor_by_a_resume(processes, tmp_path):
    """Before the first step, and of a weight that had no gradient: Adam's first step of it would be another one."""
    store = str(tmp_path / "store")
    if processes == 1:
        _check_resumes(0, 1, store)
    else:
        torch.multiprocessing.spawn(_check_resumes, args=(processes, store), nprocs=processes)


def _check_resumes(rank: int, processes: int, store: str) -> None:
    """Compare steps with and without a resume before each of them, as one of the processes."""
    rendezvous = {"init_method": f"file://{store}", "rank": rank, "world_size": processes, "timeout": timedelta(minutes=5)}
    dist.init_process_group("gloo", **rendezvous)
    try:
        for build in (
            functools.partial(torch.optim.AdamW, fused=True),
            functools.partial(torch.optim.SGD, momentum=0.9),
            AdamW8bit,
        ):
            for resumed, expected in zip(*(_weights_after_two_steps(build, resumes) for resumes in (True, False)), strict=True):
                assert torch.equal(resumed, expected)
    finally:
        dist.destroy_process_group()
    if processes > 1:
        time.sleep(0.2)  # gloo's thread must end before the interpreter does


def _weights_after_two_steps(build: Callable[..., torch.optim.Optimizer], resumes: bool) -> list[torch.Tensor]:
    """Return the weights of two layers; the second layer has no gradient in the first step."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4, bias=False)])
    if dist.get_world_size() > 1:
        for layer in layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = build(layers.parameters(), lr=0.1)
    for used in (layers[:1], layers):
        if resumes:
            optimizer = _resumed(layers, optimizer, build(layers.parameters(), lr=0.5))
        for layer in used:
            layer(torch.ones(2, 8)).square().sum().backward()
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        optimizer.zero_grad()
    return [getattr(w, "full_tensor", lambda w=w: w)().detach() for w in layers.parameters()]


def _resumed(model: torch.nn.Module, optimizer: torch.optim.Optimizer, fresh: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Save the states, which must leave them as they are, and put them into a fresh optimizer of other settings."""
    before = set(optimizer.state)
    states = [optimizer_state(model, optimizer, is_main=dist.get_rank() == 0)]
    assert set(optimizer.state) == before
    dist.broadcast_object_list(states)  # as every rank reads the file
    restore_optimizer(model, fresh, states[0], type(optimizer).__name__)
    assert settings(fresh) == settings(optimizer) and set(fresh.state) == before
    return fresh


# ---------------------------------------------------------------------------------------------- the fused kernel


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"_component_": "torch.optim.AdamW", "lr": 0.1}, {"fused": True}),
        ({"_component_": "torch.optim.Adam"}, {"fused": True}),
        ({"_component_": "torch.optim.SGD", "lr": 0.1}, {}),  # whose kernel does not know sharded weights
        ({"_component_": "torch.optim.AdamW", "fused": False}, {}),
        ({"_component_": "torch.optim.AdamW", "foreach": True}, {}),
        ({"_component_": "torch.optim.Adamax"}, {}),
        ({"_component_": "torchao.optim.AdamW8bit"}, {}),
        ({"_component_": "pidistill.training.optimizers.cpu_offload"}, {}),
    ],
)
def test_adam_and_adamw_are_fused_where_the_config_names_no_kernel(node, expected):
    assert kernel_arguments(node) == expected
    assert kernel_arguments(node, tensor_parallel_dim=2) == {}


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad", "Adamax", "RMSprop"])
def test_every_optimizer_of_torch_steps_on_sharded_weights(name):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = torch.nn.Linear(8, 4)
        sharded = copy.deepcopy(whole)
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        node, inputs = {"_component_": f"torch.optim.{name}"}, torch.randn(3, 8)
        for model, arguments in ((whole, {}), (sharded, kernel_arguments(node))):
            optimizer = resolve(node["_component_"])(model.parameters(), lr=0.1, **arguments)
            model(inputs).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(sharded.weight.full_tensor(), whole.weight)
    finally:
        dist.destroy_process_group()


def adamw_steps(gradients: list[torch.Tensor], fused: bool | None) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.linspace(-1.0, 1.0, gradients[0].numel(), dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_the_fused_kernel_makes_the_steps_of_the_equations():
    """Against AdamW written out in float64 (Loshchilov and Hutter 2019, Algorithm 2)."""
    gradients = list(torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    weight = torch.linspace(-1.0, 1.0, 64, dtype=torch.float64)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        adam = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight - 0.01 * 0.1 * weight - 0.01 * adam
    for fused in (True, None):
        torch.testing.assert_close(adamw_steps(gradients, fused), weight, rtol=1e-12, atol=1e-12)


def test_a_checkpoint_without_the_fused_kernel_resumes_with_it():
    """Its states are the same but for the counts of steps, which the kernel reads beside the weights, as floats."""
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, fused=True)
    configured = settings(optimizer)
    old = torch.optim.AdamW([torch.nn.Parameter(torch.ones(8))], lr=0.01)
    old.param_groups[0]["params"][0].grad = torch.ones(8)
    old.step()
    optimizer.load_state_dict(old.state_dict())
    optimizer.state[parameter]["step"] = torch.tensor(1.0, dtype=torch.float64)
    assert use_settings(optimizer, configured) == ["optimizer.fused None -> True"]
    assert optimizer.param_groups[0]["fused"] is True and optimizer.state[parameter]["step"].dtype == torch.float32
    parameter.grad = torch.ones(8)
    optimizer.step()
    assert optimizer.state[parameter]["step"].item() == 2.0
    assert use_settings(optimizer, [configured[0] | {"fused": False}]) == ["optimizer.fused True -> False"]
    optimizer.step()
    assert optimizer.state[parameter]["step"].item() == 3.0
