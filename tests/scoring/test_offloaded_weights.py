"""Test where a teacher's numbers are while its weights wait on the CPU (`fsdp_cpu_offload`); fake tensors stand for a GPU's."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from pidistill.distributed.shards import shard_in_place
from pidistill.scoring import equal_views, stored_teacher
from pidistill.scoring import score as scorer
from pidistill.scoring.stored_teacher import HeadAlone, StoredTeacher
from pidistill.teachers import HiddenMemory, MixturePart
from tests.support.builders import batch_of, model, random_rollouts

CUDA = torch.device("cuda", 0)
ROWS, WIDTH = 24, 16


@pytest.fixture
def cuda_mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield DeviceMesh("cuda", [0], _init_backend=False)
    dist.destroy_process_group()


def on_cpu() -> HeadAlone:
    return HeadAlone(torch.ones(ROWS, WIDTH), None)


def constant_of(part: MixturePart, rollouts, monkeypatch):
    views, tokens = batch_of(rollouts).views, sum(r.policy_tokens for r in rollouts if part.reads is None or part.reads(r))
    monkeypatch.setattr(scorer, "_forward", lambda *_: torch.ones(tokens, WIDTH, device=CUDA))
    return scorer._constant(part, views, "teacher", CUDA, None)


def test_hidden_states_that_were_kept_and_the_head_are_on_the_batchs_device(monkeypatch):
    rollouts = random_rollouts(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        part = MixturePart(1.0, on_cpu(), memory=HiddenMemory(1.0))
        read = constant_of(part, rollouts, monkeypatch)
        monkeypatch.setattr(scorer, "_forward", None)
        kept = scorer._constant(part, batch_of(rollouts).views, "teacher", CUDA, None)
        for found in (read, kept):
            assert found.hidden.device == found.weight.device == CUDA


def test_the_shares_of_a_routed_teacher_are_on_the_batchs_device():
    rollouts = random_rollouts(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        part = MixturePart(1.0, on_cpu(), reads=lambda rollout: rollout is rollouts[1])
        _, share = scorer._rows_read(part, batch_of(rollouts).views, CUDA)
        assert share.device == CUDA and len(share) == sum(r.policy_tokens for r in rollouts)


def test_a_sharded_head_is_moved_before_it_is_gathered(cuda_mesh, monkeypatch):
    rollouts = random_rollouts(2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module, weight = on_cpu(), torch.ones(ROWS, WIDTH)
        shard = shard_in_place(weight, cuda_mesh, [Shard(0)], weight.shape, weight.stride())
        module.output.weight = nn.Parameter(shard, requires_grad=False)
        assert module.output.weight.device.type == "cpu"
        found = constant_of(MixturePart(1.0, module), rollouts, monkeypatch)
        assert (type(found.weight), found.weight.device, found.weight.shape) == (type(weight), CUDA, (ROWS, WIDTH))


def test_a_stored_head_is_on_the_device_that_the_model_computes_on(cuda_mesh, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    (tmp_path / stored_teacher.ABOUT).write_text(json.dumps({"logit_cap": None}))
    module = model()
    weight = module.tok_embeddings.weight.detach()
    shard = shard_in_place(weight, cuda_mesh, [Shard(0)], weight.shape, weight.stride())
    module.tok_embeddings.weight = nn.Parameter(shard)
    assert next(module.parameters()) is module.tok_embeddings.weight
    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr(stored_teacher, "_read", lambda *_: torch.ones(ROWS, WIDTH))
        (part,) = StoredTeacher(str(tmp_path)).mixture(module)
        assert part.module.output.weight.device == CUDA


def test_weights_on_two_devices_are_compared_on_one(monkeypatch):
    """A frozen teacher of one process is on the GPU, for which the meta device stands, and the trained shards are not."""
    monkeypatch.setattr(torch, "equal", lambda a, b: a.device == b.device)
    teacher = model().to("meta")
    assert equal_views.have_equal_weights([MixturePart(1.0, teacher)], model()) == [True]
