"""Save and restore optimizer states, and build optimizers that need less memory.

`optimizer._component_: torchao.optim.AdamW8bit` keeps Adam's two states in 8 bits (blocks of 256 with a scale; tensors below
4096 elements stay in fp32). Its step is compiled, which takes seconds per shape of parameter at the first step.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchao.optim import (  # the import also lets `weights_only` loading read 8-bit states
    AdamFp8,
    AdamWFp8,
    CPUOffloadOptimizer,
)
from torchao.optim.adam import _AdamBase
from torchao.optim.subclass_8bit import OptimState8bit

from pidistill.components import resolve
from pidistill.distributed.shards import shard_in_place
from pidistill.errors import InputError

PARTS = "parts"


def cpu_offload(params: list[nn.Parameter], optimizer: str = "torch.optim.AdamW", **arguments: Any) -> CPUOffloadOptimizer:
    """Build torchao's CPUOffloadOptimizer: states and steps of one GPU's optimizer on the CPU.

    Args:
        optimizer: dotted path of the optimizer that steps there; it gets ``arguments``.
    """
    if arguments.get("offload_gradients"):
        raise InputError(
            "optimizer.offload_gradients=True frees each gradient during the backward: a step would lose those of earlier "
            "micro-batches, and one that is NaN would not be seen; set optimizer.offload_gradients=False"
        )
    if not torch.cuda.is_available():
        raise InputError(
            "optimizer._component_=pidistill.training.optimizers.cpu_offload moves states from a GPU to the CPU, and this "
            f"machine has no CUDA device; set optimizer._component_={optimizer}"
        )
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise InputError(
            f"pidistill.training.optimizers.cpu_offload is for one GPU, and this run has {dist.get_world_size()} processes; "
            f"set optimizer._component_={optimizer} and fsdp_cpu_offload=True"
        )
    return CPUOffloadOptimizer(params, resolve(optimizer), **arguments)


def kernel_arguments(node: Mapping[str, Any], tensor_parallel_dim: int = 1) -> dict[str, Any]:
    """Return ``fused=True`` for torch's Adam and AdamW, and nothing where their settings name a kernel.

    torch itself chooses a loop over single tensors for FSDP2's sharded weights, several small kernels for each of them. The
    fused one makes the same step in one pass and in place; the last bits are rounded differently. torch's other optimizers
    have no fused kernel for sharded weights, and tensor parallelism shards weights in several ways, which the kernel refuses.
    """
    has_kernel = resolve(node["_component_"]) in (torch.optim.Adam, torch.optim.AdamW) and tensor_parallel_dim == 1
    named = any(name in node for name in ("fused", "foreach", "differentiable"))
    return {"fused": True} if has_kernel and not named else {}


def check_mixed_precision(optimizer: str | None) -> None:
    """Refuse an optimizer, given by its dotted path, that mixed precision does not work with."""
    if optimizer is not None and resolve(optimizer) is cpu_offload:
        raise InputError(
            f"optimizer._component_={optimizer} does not work with compute_dtype=bf16, whose gradients are added up in fp32 "
            "beside the weights; set fsdp_cpu_offload=True, which moves weights, gradients and states to the CPU, and "
            "optimizer._component_=torch.optim.AdamW"
        )


def check_sharding(optimizer: str | None) -> None:
    """Refuse an optimizer, given by its dotted path, that cannot step the weights which FSDP2 shards."""
    if optimizer is not None and resolve(optimizer) is torch.optim.Adafactor:
        raise InputError(
            f"optimizer._component_={optimizer} does not work with weights that FSDP2 shards, which are those of several "
            "processes and of compute_dtype=bf16; set optimizer._component_=torchao.optim.AdamW8bit, which saves memory too"
        )


def keep_second_moments_above_zero(optimizer: Optimizer, key: str = "optimizer._component_") -> None:
    """Raise the code 0 to the smallest one above, after every step of torchao's 8-bit optimizers.

    torchao rounds a small second moment to 0 and keeps the first. Where the next gradient is 0 (the embedding of a token that
    a batch lacks, all weights where no rollout has an advantage) the step would be first moment / eps: 92 at lr 0.01 in a test.
    Its 4-bit states have no code for 0. States in fp8 have the same leap (1640 there) and no code to raise: they are refused.
    ``key`` is the one of the config that names the optimizer.
    """
    if isinstance(optimizer, CPUOffloadOptimizer):
        for inner in filter(None, (*optimizer.optim_dict.values(), optimizer.d_opt)):
            keep_second_moments_above_zero(inner, "optimizer.optimizer")
        return
    if isinstance(optimizer, (AdamFp8, AdamWFp8)):
        raise InputError(
            f"{type(optimizer).__name__} rounds small second moments to 0, and a gradient of 0 then makes a step of the first "
            f"moment / eps; set {key}=torchao.optim.AdamW8bit"
        )

    def raise_codes(*_: Any) -> None:
        for state in optimizer.state.values():
            moment = state.get("exp_avg_sq")
            moment = moment.to_local() if isinstance(moment, DTensor) else moment
            if isinstance(moment, OptimState8bit):
                moment.codes.clamp_(min=1)

    if isinstance(optimizer, _AdamBase):
        optimizer.register_step_post_hook(raise_codes)


def check_clipping(optimizer: Optimizer, clip_grad_norm: float) -> None:
    """Refuse clipping that would have no effect."""
    if isinstance(optimizer, CPUOffloadOptimizer) and clip_grad_norm != math.inf:
        raise InputError(
            f"clip_grad_norm={clip_grad_norm:g} has no effect on pidistill.training.optimizers.cpu_offload, which copies "
            "gradients to the CPU during the backward, before they are clipped; set clip_grad_norm=null"
        )


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale gradients so that their norm, over all ranks, is at most ``limit``; return the norm before.

    This is torch's `clip_grad_norm_`, for parameters on several meshes too (tensor parallelism), which torch does not add up.
    """
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [nn.utils.get_total_norm([p.grad for p in of_mesh]) for of_mesh in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = nn.utils.get_total_norm(norms) if len(norms) != 1 else norms[0]
    for of_mesh in by_mesh.values():
        nn.utils.clip_grads_with_norm_(of_mesh, limit, total)
    return float(total)


def clear_gradients(optimizer: Optimizer) -> None:
    """Clear gradients after a step, or in place of one that is skipped."""
    optimizer.zero_grad(set_to_none=True)
    if isinstance(optimizer, CPUOffloadOptimizer):
        optimizer.queue.clear()  # else a parameter without gradient in the next step would take this one's


# ---------------------------------------------------------------------------------------------- states


def optimizer_state(model: nn.Module, optimizer: Optimizer, is_main: bool) -> dict[str, Any]:
    """Return everything that a checkpoint holds of an optimizer, on CPU; a collective, of use on rank 0.

    Whole states under their parameters' names, for any number of ranks; but of optimizers whose states torch cannot gather each
    rank's own part, for the same number of ranks. Before the first step there are only settings.
    """
    if isinstance(optimizer, CPUOffloadOptimizer):
        return {PARTS: [optimizer.state_dict()]}
    if not _states_stay_apart(optimizer):
        if not optimizer.state:  # torch's function would make states by a step without gradient, which Adam then counts
            return {"state": {}, "param_groups": _groups(optimizer)}
        return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    parts: list[Any] | None = [None] * dist.get_world_size() if is_main else None
    dist.gather_object(_own_part(optimizer), parts)
    return {PARTS: parts}


def restore_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any], kind: str | None = None) -> None:
    """Put back what :func:`optimizer_state` gave, its settings (lr, weight decay) included.

    States of another number of ranks, or of another optimizer class than ``kind``, where that is known, are refused.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    in_parts = isinstance(optimizer, CPUOffloadOptimizer) or _states_stay_apart(optimizer)
    found = len(state[PARTS]) if PARTS in state else None
    if in_parts != (PARTS in state) or (in_parts and found != ranks):
        theirs = f"{found} processes' own parts" if found else "whole states"
        raise InputError(
            f"the checkpoint holds {theirs} of an optimizer, which {type(optimizer).__name__} with {ranks} processes cannot "
            "take; resume with the `optimizer` and the number of processes that it was trained with"
        )
    if kind not in (None, type(optimizer).__name__):
        raise InputError(
            f"the checkpoint holds the states of {kind}, which {type(optimizer).__name__} cannot take; resume with the "
            "`optimizer._component_` that it was trained with, or set another output_dir"
        )
    if isinstance(optimizer, CPUOffloadOptimizer):
        optimizer.load_state_dict(state[PARTS][0])
    elif in_parts:
        _load_own_part(optimizer, state[PARTS][rank])
    elif not state["state"]:  # before the first step, and of SGD without momentum, which torch's function does not expect
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            for key in saved.keys() - {"params"}:
                set_group_value(group, key, saved[key])
    else:
        names = [name for group in state["param_groups"] for name in group["params"]]
        without = [p for p, name in zip(_parameters(optimizer), names, strict=True) if name not in state["state"]]
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks > 1, strict=not without)
        set_optimizer_state_dict(model, optimizer, state, options=options)
        for parameter in without:  # it had no gradient yet; torch's function made its state by a step without one
            optimizer.state.pop(parameter, None)


# Settings that decide which states an optimizer keeps: a change on resume would need states that the checkpoint lacks.
_STATE_SETTINGS = ("amsgrad", "centered")


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of every parameter group as plain values (lr, betas, weight_decay, …), without the parameters."""
    return [{key: _plain(value) for key, value in group.items()} for group in _groups(optimizer)]


def use_settings(optimizer: Optimizer, configured: list[dict[str, Any]]) -> list[str]:
    """Put the config's settings in place of those that a checkpoint brought; return the changes, as text.

    `lr` is left alone where a scheduler computes it from `initial_lr`.
    """
    changes = {}
    for group, wanted in zip(optimizer.param_groups, configured, strict=True):
        for key, value in wanted.items():
            found = _plain(group.get(key))
            if found == value or (key == "lr" and "initial_lr" in wanted):
                continue
            if key in _STATE_SETTINGS:
                raise InputError(
                    f"optimizer.{key}={value} needs other states than the checkpoint holds, which was trained with {found}; "
                    f"resume with optimizer.{key}={found}, or set another output_dir"
                )
            if key == "fused":
                _move_step_counts(optimizer, group, beside_weights=bool(value or group.get("capturable")))
            changes[f"optimizer.{'lr' if key == 'initial_lr' else key} {found} -> {value}"] = None
            set_group_value(group, key, value)
    return list(changes)


def _move_step_counts(optimizer: Optimizer, group: dict[str, Any], *, beside_weights: bool) -> None:
    """Put the counts of steps where the kernel reads them: the fused one beside the weights, as floats, others on the CPU."""
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].to(parameter.device if beside_weights else "cpu", torch.float32)


def set_group_value(group: dict[str, Any], key: str, value: Any) -> None:
    """Set one setting; torchao keeps lr as a tensor, which its compiled step reads."""
    if isinstance(group.get(key), torch.Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(value) if isinstance(value, list) else value


def _states_stay_apart(optimizer: Optimizer) -> bool:
    """Return whether states are torchao's quantized ones of sharded parameters, which DTensor cannot gather (torch 2.13)."""
    sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    return sharded and isinstance(optimizer, _AdamBase)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of every parameter group as they are, without the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _own_part(optimizer: Optimizer) -> dict[str, Any]:
    states = [optimizer.state.get(p, {}) for p in _parameters(optimizer)]
    local = [{k: (v.to_local() if isinstance(v, DTensor) else v).cpu() for k, v in state.items()} for state in states]
    return {"state": local, "groups": _groups(optimizer)}


def _load_own_part(optimizer: Optimizer, part: dict[str, Any]) -> None:
    for group, saved in zip(optimizer.param_groups, part["groups"], strict=True):
        group |= saved
    for parameter, state in zip(_parameters(optimizer), part["state"], strict=True):
        shape = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape
        if any(value.shape != shape for key, value in state.items() if key != "step"):
            raise InputError(
                f"the checkpoint holds another share of {type(optimizer).__name__}'s states for this process than its share of "
                "the weights; resume with the data_parallel_replicate_dim that it was trained with"
            )
        if state:
            optimizer.state[parameter] = {key: _placed(value, parameter, key) for key, value in state.items()}


def _placed(value: torch.Tensor, parameter: DTensor, key: str) -> torch.Tensor:
    if key == "step":
        return value
    shard = value.to(parameter.to_local().device)
    return shard_in_place(shard, parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride())
