"""Find, start and merge the LoRA and DoRA adapters of torchtune's ``lora_`` builders.

An adapted linear layer is W·x + (α/r)·B·A·x with A, B trained and W frozen; B = 0 at the start, so that it starts as W. DoRA
(arXiv 2402.09353) has one magnitude m per row besides, ‖W‖ at the start: (m / ‖W + (α/r)·B·A‖) · (W + (α/r)·B·A)·x.
"""

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.dtypes.nf4tensor import linear_nf4
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from pidistill.models.nf4 import rounded

# Activation checkpointing wraps layers and shows in module names.
_WRAPPER = "_checkpoint_wrapped_module."
PARTS = ("lora_a.weight", "lora_b.weight", "magnitude")


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the adapted layers with the names that the state dict has for them."""
    for name, module in model.named_modules():
        if hasattr(module, "adapter_params"):
            yield name.replace(_WRAPPER, ""), module


def has_adapters(model: nn.Module) -> bool:
    return next(adapter_modules(model), None) is not None


def train_adapters_only(model: nn.Module) -> None:
    """Freeze every other weight; a model without adapters trains whole."""
    if has_adapters(model):
        set_trainable_params(model, get_adapter_params(model))


def rank_of(module: nn.Module) -> int:
    return module.lora_a.weight.shape[0]


def scale_of(module: nn.Module) -> float:
    """Return α/r."""
    return module.scaling if hasattr(module, "scaling") else module.alpha / module.rank  # DoRA's, LoRA's


def is_dora(module: nn.Module) -> bool:
    return "magnitude" in module.adapter_params()


# ---------------------------------------------------------------------------------------------- start


def with_initial_adapters(model: nn.Module, weights: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return a base checkpoint's full state dict with torchtune's initial values for the adapters that it lacks, on CPU.

    They are drawn before sharding, from ``seed`` alone: the same for any number of ranks. ``model`` may be on meta.
    """
    initial = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in adapter_modules(model):
            fresh = copy.deepcopy(module, {id(module.weight): module.weight})  # the weight itself is large, or in 4 bits
            fresh.to_empty(device="cpu")
            fresh.initialize_parameters()
            initial |= {f"{name}.{parameter}": fresh.get_parameter(parameter).detach() for parameter in module.adapter_params()}
            if is_dora(module) and f"{name}.weight" in weights:
                initial[f"{name}.magnitude"] = _row_norms(module, weights[f"{name}.weight"])
    return initial | weights


def _row_norms(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the norm of each row of the weight that the layer computes with, which 4 bits have changed."""
    weight = weight.to(module.weight.dtype)
    if module._quantize_base:
        weight = rounded(weight)
    return torch.linalg.norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))


def scale_weights_alone(model: nn.Module) -> None:
    """Give DoRA layers with a bias the paper's forward: torchtune 0.6.1 scales the bias too.

    Neither the weights that torchtune merges nor PEFT do that, and both would be another model than the one that was trained.
    """
    for _, module in adapter_modules(model):
        if is_dora(module) and module.bias is not None:
            module.forward = functools.partial(_dora_forward, module)


def _dora_forward(layer: nn.Module, x: Tensor) -> Tensor:
    base = linear_nf4(x, layer.weight) if layer._quantize_base else F.linear(x, layer.weight)
    if layer.disabled:
        return base + layer.bias
    update = layer.scaling * layer.lora_b(layer.lora_a(layer.dropout(x)))
    with torch.no_grad():  # the paper's §4.3: the norm is a constant in the backward
        direction = layer.weight.to(x.dtype) + layer.scaling * (layer.lora_b.weight @ layer.lora_a.weight)
        norm = torch.linalg.norm(direction, dim=1)
    return (layer.magnitude / norm) * (base + update) + layer.bias


# ---------------------------------------------------------------------------------------------- merge


def merged(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``model``'s full state dict with the adapted weight in place of W, in its base's format.

    Without adapters it is ``weights``, which may share memory with the model and is not changed.
    """
    scales = {name: scale_of(module) for name, module in adapter_modules(model)}
    return merge(weights, scales) if scales else weights


def merge(weights: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Return a full state dict with each named layer's adapter merged into its weight, and without adapters.

    Args:
        weights: those of the base and, under torchtune's names, the adapters'.
        scales: α/r of each adapted layer.
    """
    result = {name: tensor for name, tensor in weights.items() if not name.endswith(PARTS)}
    for layer, scale in scales.items():
        a, b, magnitude = (weights.get(f"{layer}.{part}") for part in PARTS)
        result[f"{layer}.weight"] = _adapted(weights[f"{layer}.weight"], a, b, scale, magnitude)
    return result


def _adapted(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None) -> Tensor:
    """Return the weight of the adapted layer, computed in fp32 at least and rounded once."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    whole = weight.to(exact) + scale * (b.to(exact) @ a.to(exact))
    if magnitude is not None:
        whole *= (magnitude.to(exact) / torch.linalg.norm(whole, dim=1))[:, None]
    return whole.to(weight.dtype)
