"""Keep zeros exact: the same weights reading the same tokens give the same hidden states, wherever they were computed.

A rollout whose two prompts are the same ids (an example without privileged information, the control arm `none`) is one sequence
to both views. Computed at two places of a packed row, or in micro-batches of another shape, it may round differently. A
divergence that should be 0 then has a gradient of rounding noise, and an optimiser such as AdamW turns noise into steps of full
size. So the states of one computation stand for all of them.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pidistill.scoring.head import ConstantPart
from pidistill.teachers import MixturePart, on_all_ranks
from pidistill.types import BatchInputs


def share_equal_views(
    views: BatchInputs,
    hidden: dict[str, Float[Tensor, "N H"]],
    constants: dict[str, list[ConstantPart]],
    equal: dict[str, list[bool]],
) -> None:
    """Give all views the same hidden states on rollouts whose two prompts are the same ids, in place.

    Args:
        hidden: the states of the views that the trained model computes with its head. They stand for the others.
        equal: for each side of ``constants`` and each of its terms, whether its weights are the trained model's.
    """
    same = _tokens_of_equal_prompts(views, next(iter(hidden.values())))
    if same is None:
        return
    first, *others = hidden
    for view in others:
        hidden[view] = torch.where(same, hidden[first], hidden[view])
    states = hidden[first].detach()
    for side, terms in constants.items():
        constants[side] = [
            replace(term, hidden=torch.where(same, states, term.hidden))
            if is_equal and term.hidden is not None and term.hidden.dtype == states.dtype
            else term
            for term, is_equal in zip(terms, equal[side], strict=True)
        ]


def _tokens_of_equal_prompts(views: BatchInputs, states: Float[Tensor, "N H"]) -> Bool[Tensor, "N 1"] | None:
    """Return which policy tokens belong to rollouts with equal prompts; None where no rollout has."""
    per_rollout = [rollout.reads_alike for rollout in views.rollouts]
    if not any(per_rollout):
        return None
    lengths = torch.tensor([rollout.policy_tokens for rollout in views.rollouts])
    return torch.tensor(per_rollout).repeat_interleave(lengths)[:, None].to(states.device)


def have_equal_weights(parts: Sequence[MixturePart], model: nn.Module) -> list[bool]:
    """Return, for each part of a teacher, whether its weights are those of the trained ``model`` to the bit, on all ranks.

    It costs next to nothing once training has moved the weights: the trained ones are compared first, the smallest in front.
    """
    device = next(model.parameters()).device
    return [on_all_ranks(_has_equal_weights(part, model), device) for part in parts]


@torch.no_grad()
def _has_equal_weights(part: MixturePart, model: nn.Module) -> bool:
    if part.module is model:
        return part.adapters or not _adapters_act(model)
    own = {_plain(name): p for name, p in part.module.named_parameters()}
    trained = {_plain(name): p for name, p in model.named_parameters()}
    first = sorted(trained, key=lambda name: (not trained[name].requires_grad, trained[name].numel()))
    return own.keys() == trained.keys() and all(_are_equal(own[name], trained[name]) for name in first)


def _adapters_act(model: nn.Module) -> bool:
    """Return whether LoRA adapters may change a forward: their second matrix is not 0, or they have a magnitude (DoRA)."""
    second = ((name, p) for name, p in model.named_parameters() if name.endswith(("lora_b.weight", "magnitude")))
    return any(name.endswith("magnitude") or bool(_local(p).any()) for name, p in second)


def _plain(name: str) -> str:
    """Return a parameter's name without the wrapper of activation checkpointing."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p.detach()


def _are_equal(own: Tensor, trained: Tensor) -> bool:
    """Compare this rank's shards; 4-bit weights, and a shard with a whole matrix, count as different."""
    own, trained = _local(own), _local(trained)
    if type(own) is not Tensor or type(trained) is not Tensor or own.shape != trained.shape:
        return False
    return torch.equal(own, trained.to(own))  # with `fsdp_cpu_offload` one of them may be on the CPU
