"""Train replicas of a sharded model with and without `fsdp_cpu_offload`, in processes of torchrun; both must be the same.

CPU processes stand in for GPUs: a shard that is on the CPU already is not pinned, all else takes the way that it takes there.
"""

import functools

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.functional import cross_entropy
from torchtune import training

from pidistill.distributed import tensor_parallel
from pidistill.testing import tiny_model
from pidistill.training.optimizers import clip_gradients, optimizer_state

VOCABULARY = 64


def train(offload: bool) -> tuple[list[float], dict[str, torch.Tensor], dict]:
    """Return the gradient norms of three steps of two micro-batches, and the weights and the optimizer's state after them."""
    model = tiny_model(VOCABULARY)
    tensor_parallel.shard_model(
        model,
        [functools.partial(training.get_shard_conditions, names_to_match=[])],
        device_type="cpu",
        cpu_offload=offload,
        reshard_after_forward=True,
        replicas=tensor_parallel.make_replicas("cpu", dist.get_world_size(), 2),
        compute_dtype=torch.bfloat16,
    )
    optimizer, norms = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    draw = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(3):
        for last in (False, True):
            model.set_requires_all_reduce(last)
            ids = torch.randint(0, VOCABULARY, (2, 9), generator=draw)
            cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        norms.append(clip_gradients(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    return norms, weights, optimizer_state(model, optimizer, dist.get_rank() == 0)


def main() -> None:
    dist.init_process_group("gloo")
    tensor_parallel.CPUOffloadPolicy = functools.partial(CPUOffloadPolicy, pin_memory=False)
    (norms, weights, state), (their_norms, their_weights, their_state) = train(True), train(False)
    assert norms == their_norms and len(set(norms)) == 3
    assert all(torch.equal(weights[name], their_weights[name]) for name in their_weights)
    for name, values in their_state.get("state", {}).items():
        assert all(torch.equal(state["state"][name][key], value) for key, value in values.items()), name
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
