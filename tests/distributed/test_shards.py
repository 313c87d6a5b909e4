"""Test shards that wait on the CPU for a GPU, for which a mesh of CUDA devices without its backend stands."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from pidistill.distributed.run import Run
from pidistill.distributed.shards import forward_device, shard_in_place
from pidistill.distributed.tensor_parallel import shard_model
from pidistill.errors import InputError
from pidistill.testing import tiny_model
from pidistill.training.load import _fill, _keep_buffers
from pidistill.training.optimizers import _placed

META, CPU = torch.device("meta"), torch.device("cpu")


@pytest.fixture
def cuda_mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield DeviceMesh("cuda", [0], _init_backend=False)
    dist.destroy_process_group()


def sharded(weight: torch.Tensor, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(DTensor.from_local(weight, mesh, [Shard(0)], run_check=False))


def test_a_shard_stays_where_its_data_are_and_says_so(cuda_mesh):
    data = torch.arange(8.0).view(4, 2)
    shard = shard_in_place(data, cuda_mesh, [Shard(0)], data.shape, data.stride())
    # FSDP reads the device of the whole, and keeps it where it puts the local data elsewhere.
    assert shard.device == shard._local_tensor.device == CPU
    assert shard._local_tensor.data_ptr() == data.data_ptr()
    assert (shard.shape, shard.stride(), shard.device_mesh, shard.placements) == ((4, 2), (2, 1), cuda_mesh, (Shard(0),))


def test_with_offload_shards_are_loaded_on_the_cpu_and_whole_weights_on_the_runs_device(cuda_mesh):
    """The meta device stands for the GPU."""
    model = nn.Sequential(nn.Linear(2, 4, bias=False, device="meta"), nn.Linear(4, 3, bias=False, device="meta"))
    model[0].weight = sharded(model[0].weight.detach(), cuda_mesh)
    model[1].requires_grad_(False)
    weights = {"0.weight": torch.ones(4, 2), "1.weight": torch.ones(3, 4)}
    run = Run(META, torch.float32, 0, 1, 0, Path("unused"))
    _fill(model, run, dict(weights), cpu_offload=True)
    trained, frozen = model[0].weight, model[1].weight
    assert isinstance(trained, DTensor) and trained.requires_grad and not frozen.requires_grad
    assert (trained.device, trained._local_tensor.device, frozen.device) == (CPU, CPU, META)
    assert torch.equal(trained._local_tensor, weights["0.weight"])


def test_buffers_that_a_loader_left_on_the_cpu_are_moved_to_the_runs_device():
    model = nn.Module()
    model.register_buffer("scale", torch.ones(2))
    model.layer = nn.Module()
    model.layer.scale = nn.Parameter(torch.ones(2))  # what torchtune's loader makes of a buffer beside 4-bit weights
    _keep_buffers(model, ["scale", "layer.scale"], META)
    assert {name: buffer.device for name, buffer in model.named_buffers()} == {"scale": META, "layer.scale": META}
    assert not list(model.parameters())


def test_a_restored_optimizer_state_is_on_the_device_of_its_shard(cuda_mesh):
    weight = torch.ones(4, 2)
    parameter = nn.Parameter(shard_in_place(weight, cuda_mesh, [Shard(0)], weight.shape, weight.stride()))
    state = _placed(torch.full((4, 2), 3.0), parameter, "exp_avg")
    assert state.device == state._local_tensor.device == CPU and state.shape == parameter.shape
    assert torch.equal(state._local_tensor, torch.full((4, 2), 3.0))


def test_a_model_computes_on_the_device_of_its_mesh(cuda_mesh, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    model, weight = nn.Linear(2, 4, bias=False), torch.ones(4, 2)
    assert forward_device(model) == CPU
    model.weight = nn.Parameter(shard_in_place(weight, cuda_mesh, [Shard(0)], weight.shape, weight.stride()))
    assert model.weight.device == CPU and forward_device(model) == torch.device("cuda", 3)


def test_a_layer_of_two_dtypes_is_refused_before_it_is_sharded(cuda_mesh):
    model = tiny_model(50)
    model.layers[0].mlp.w1.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"layers.0 has float32 in .* and bfloat16 in mlp.w1.weight"):
        shard_model(
            model, [lambda name, _: name == "layers.0"], device_type="cuda", cpu_offload=False, reshard_after_forward=True
        )
