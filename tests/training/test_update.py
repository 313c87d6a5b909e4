"""Test how the gradients of an optimiser step's micro-batches are added up over replicas: with one exchange, not one each."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pidistill.training.update import add_gradients, mark_last


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_only_the_last_of_some_items_is_marked_as_last(count):
    assert list(mark_last(iter(range(count)))) == [(item, item == count - 1) for item in range(count)]


@pytest.mark.parametrize("steps", [1, 2])
def test_replicas_exchange_gradients_once_per_step_and_get_those_of_all_micro_batches(steps, process_group, monkeypatch):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(steps, 3, 5, 3)
    expected = [torch.autograd.grad(model(step.flatten(0, 1)).pow(2).sum(), list(model.parameters())) for step in inputs]
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    calls, exchange = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: (calls.append(args), exchange(*args, **kwargs)))
    for step, exact in zip(inputs, expected, strict=True):
        for batch, last in mark_last(step):
            add_gradients(model, model(batch).pow(2).sum(), 1, last=last)
            assert all((p.grad is not None) == last for p in model.parameters())
        for parameter, gradient in zip(model.parameters(), exact, strict=True):
            assert isinstance(parameter.grad, DTensor)
            torch.testing.assert_close(parameter.grad.full_tensor(), gradient)
        model.zero_grad()
    assert len(calls) == 2 * steps  # one for each of the two layers
