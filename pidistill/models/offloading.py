"""Keep activations in host memory between forward and backward, as torchtune does; CUDA only."""

import contextlib
import functools
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune.training import NoOpManager, OffloadActivations

from pidistill.errors import InputError


def check_offloading(cfg: DictConfig, device: torch.device, ranks: int) -> None:
    """Refuse `fsdp_cpu_offload` and `enable_activation_offloading` where this device or this number of processes cannot."""
    for key in ("fsdp_cpu_offload", "enable_activation_offloading"):
        if cfg.get(key, False) and device.type != "cuda":
            raise InputError(f"{key}=True moves memory from a GPU to the CPU, and device is {device.type}; set {key}=False")
    dtype = cfg.get("dtype") or "fp32"
    mixed = (cfg.get("compute_dtype") or dtype) != dtype
    if cfg.get("fsdp_cpu_offload", False) and ranks == 1 and not mixed:
        raise InputError(
            "fsdp_cpu_offload=True moves shards to the CPU, and one process has no shards but in mixed precision; run with "
            "--nproc_per_node above 1, set compute_dtype=bf16, or set fsdp_cpu_offload=False and "
            "optimizer._component_=pidistill.training.optimizers.cpu_offload"
        )
    if cfg.get("enable_activation_offloading", False) and not cfg.get("enable_activation_checkpointing", False):
        raise InputError(
            "enable_activation_offloading=True is for what checkpointing keeps, each layer's input; set "
            "enable_activation_checkpointing=True too"
        )


def offload_activations(model: nn.Module) -> None:
    """Let every forward of ``model`` that a backward follows keep in host memory what autograd saves.

    One backward follows each such forward, which is how the recipes score. Sampling and constant views save nothing. The scorer
    keeps its head out of it with :data:`keep_on_device`.
    """
    offload, forward = OffloadActivations(), model.forward

    @functools.wraps(forward)
    def with_offloading(*args: Any, **kwargs: Any) -> Any:
        with offload if torch.is_grad_enabled() else contextlib.nullcontext():
            return forward(*args, **kwargs)

    model.forward = with_offloading


# Around the output head: its hidden states are needed at once in the backward, so that offloading them costs and saves nothing.
keep_on_device = NoOpManager
