"""Test which saved tensors leave the device: a stand-in records them, since torchtune's own hooks need a GPU."""

import pytest
import torch
from omegaconf import OmegaConf
from torch.autograd.graph import saved_tensors_hooks

from pidistill.errors import InputError
from pidistill.models.offloading import check_offloading, offload_activations
from pidistill.scoring.score import score
from pidistill.types import ScoreRequest
from tests.support.builders import CPU, batch_of, gradients, model, random_rollouts

REQUEST = ScoreRequest(student_grad=True, teacher_grad=True)


class Recorder(saved_tensors_hooks):
    """Notes the shapes that autograd saves, and copies them as a transfer would."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []
        super().__init__(self._pack, lambda copy: copy)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tensor.shape)
        return tensor if isinstance(tensor, torch.nn.Parameter) else tensor.clone()


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr("pidistill.models.offloading.OffloadActivations", lambda: made)
    return made


def trained_gradients(module, batch):
    score(module, batch, REQUEST, chunk_tokens=3).student_logprobs.sum().backward()
    return gradients(module)


def test_a_forward_with_gradient_goes_through_the_hooks_and_its_head_does_not(recorder):
    batch = batch_of(random_rollouts(4))
    expected = trained_gradients(model(), batch)
    module = model()
    offload_activations(module)
    ours = trained_gradients(module, batch)
    assert len(recorder.shapes) > 20
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    hidden = (batch.targets.numel(), module.tok_embeddings.embedding_dim)
    assert torch.Size(hidden) not in recorder.shapes  # what the head saves of each view


def test_sampling_and_constant_views_save_nothing(recorder):
    module = model()
    offload_activations(module)
    with torch.no_grad():
        score(module, batch_of(random_rollouts(4)), REQUEST)
        module(torch.ones(1, 4, dtype=torch.long))
    assert not recorder.shapes


@pytest.mark.parametrize(
    ("changes", "device", "ranks", "message"),
    [
        ({"fsdp_cpu_offload": True}, "cpu", 2, "fsdp_cpu_offload=True moves memory from a GPU to the CPU, and device is cpu"),
        ({"fsdp_cpu_offload": True}, "cuda", 1, "one process has no shards but in mixed precision; run with --nproc"),
        ({"enable_activation_offloading": True}, "cpu", 2, "enable_activation_offloading=True moves memory .* device is cpu"),
        ({"enable_activation_offloading": True}, "cuda", 2, "set enable_activation_checkpointing=True too"),
    ],
)
def test_offloading_that_cannot_work_is_refused(changes, device, ranks, message):
    with pytest.raises(InputError, match=message):
        check_offloading(OmegaConf.create(changes), torch.device(device), ranks)


def test_offloading_that_works_is_not_refused():
    both = {"enable_activation_offloading": True, "enable_activation_checkpointing": True, "fsdp_cpu_offload": True}
    check_offloading(OmegaConf.create(both), torch.device("cuda"), 2)
    check_offloading(OmegaConf.create(dict.fromkeys(both, False)), CPU, 1)
