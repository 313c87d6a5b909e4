"""LoRA adapters of torchtune's ``lora_`` builders: found, started, and merged into the weights they adapt.

An adapted linear layer is W·x + (α/r)·B·A·x with A, B trained and W frozen; B = 0 at the start, so that it starts as W.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchtune.modules.peft import get_adapter_params, get_merged_lora_ckpt, set_trainable_params

from pidistill.errors import InputError


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "adapter_params"))


def has_adapters(model: nn.Module) -> bool:
    return next(adapter_modules(model), None) is not None


def train_adapters_only(model: nn.Module) -> None:
    """Freeze every other weight; a model without adapters trains whole."""
    if has_adapters(model):
        set_trainable_params(model, get_adapter_params(model))


def with_initial_adapters(model: nn.Module, weights: dict[str, Any], seed: int) -> dict[str, Any]:
    """A base checkpoint's full state dict, and for adapters that it lacks torchtune's own initial values, on CPU.

    They are drawn before sharding, from ``seed`` alone: the same for any number of ranks. ``model`` may be on meta.

    Raises:
        InputError: the base would be quantized (QLoRA), which a full state dict cannot fill.
    """
    initial = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in adapter_modules(model):
            if getattr(module, "_quantize_base", False):
                raise InputError("model.quantize_base=True is not supported; set it to False, or take a smaller model")
            fresh = copy.deepcopy(module)
            fresh.to_empty(device="cpu")
            fresh.initialize_parameters()
            initial |= {f"{name}.{parameter}": fresh.get_parameter(parameter).detach() for parameter in module.adapter_params()}
            if "magnitude" in module.adapter_params() and f"{name}.weight" in weights:  # DoRA's starts at its weight's norm
                initial[f"{name}.magnitude"] = torch.linalg.norm(weights[f"{name}.weight"], dim=1)
    return initial | weights


def merged(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``model``'s full state dict with W + (α/r)·B·A in place of W, in its base's format; unchanged without adapters.

    ``weights`` may share memory with the model, and stays as it is.
    """
    scales = {_scale(module) for _, module in adapter_modules(model)}
    if not scales:
        return weights
    if len(scales) > 1:
        raise InputError(
            f"the model's adapters have several α/r ({sorted(scales)}); torchtune merges one only: use one in `model`"
        )
    (scale,) = scales
    adapted = {name.replace(".lora_a.weight", ".weight") for name in weights if name.endswith(".lora_a.weight")}
    # torchtune adds to the weights in place.
    copies = {name: tensor.clone() if name in adapted else tensor for name, tensor in weights.items()}
    return get_merged_lora_ckpt(copies, rank=1, alpha=scale)


def _scale(module: nn.Module) -> float:
    return module.scaling if hasattr(module, "scaling") else module.alpha / module.rank  # DoRA's, LoRA's
