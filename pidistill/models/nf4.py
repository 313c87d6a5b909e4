"""Store frozen weights in 4 bits (NF4 of QLoRA, arXiv 2305.14314) as torchao's tensors, and read them back.

A matrix is cut into blocks of 64 elements with a scale each, and the scales into blocks of 256 with a scale of their own; so a
matrix, and each rank's shard of its rows, has a multiple of 64 · 256 elements.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.modules.common_utils import reparametrize_as_dtype_state_dict_post_hook
from torchtune.training._distributed import _gather_nf4_tensor

from pidistill.errors import InputError

BLOCK_ELEMENTS = 64 * 256


def is_nf4(tensor: Tensor) -> bool:
    return isinstance(tensor._local_tensor if isinstance(tensor, DTensor) else tensor, NF4Tensor)


def whole(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a plain tensor with the values that a forward computes with; of a sharded one on every rank (a collective)."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to(device)  # from the CPU, where `fsdp_cpu_offload` has it
        # torch's own gathering does not know NF4.
        tensor = _gather_nf4_tensor(tensor) if is_nf4(tensor) else tensor.full_tensor()
    return tensor.get_original_weight() if isinstance(tensor, NF4Tensor) else tensor


def rounded(weight: Tensor) -> Tensor:
    """Return a plain tensor with the values that it has after it was stored in 4 bits."""
    return to_nf4(weight).get_original_weight()


def stored_as_in(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a full state dict with those weights in 4 bits that ``model`` has in 4 bits."""
    # Activation checkpointing wraps layers and shows in parameter names.
    names = {n.replace("_checkpoint_wrapped_module.", "") for n, p in model.named_parameters() if is_nf4(p)}
    return {name: to_nf4(weight) if name in names else weight for name, weight in weights.items()}


def give_out_whole_weights(model: nn.Module) -> None:
    """Let state dicts of ``model`` hold 4-bit weights as plain ones in their own dtype, on CPU; sharded ones stay as they are.

    This replaces torchtune's hook, which gives them in bf16 whatever the run's dtype, and does not work on the meta device.
    """
    for key, hook in list(model._state_dict_hooks.items()):
        if getattr(hook, "func", None) is reparametrize_as_dtype_state_dict_post_hook:
            del model._state_dict_hooks[key]
    if any(is_nf4(parameter) for parameter in model.parameters()):
        model._register_state_dict_hook(_whole_weights)


def _whole_weights(module: nn.Module, state_dict: dict[str, Tensor], *_: object) -> None:
    for name, tensor in state_dict.items():
        if isinstance(tensor, NF4Tensor):
            weight = tensor.get_original_weight()
            state_dict[name] = weight if weight.is_meta else weight.cpu()


def check_shapes(model: nn.Module, ranks: int) -> None:
    """Refuse matrices whose rows do not divide into whole blocks. ``model`` may be on the meta device."""
    for name, parameter in model.named_parameters():
        if not is_nf4(parameter):
            continue
        rows, elements = parameter.shape[0], parameter.numel()
        if rows % ranks or elements % (ranks * BLOCK_ELEMENTS):
            raise InputError(
                f"model.quantize_base=True needs matrices whose share on each of {ranks} ranks is a multiple of "
                f"{BLOCK_ELEMENTS} elements, and {name} is {rows}x{elements // rows}; set quantize_base=False, or run on "
                "fewer ranks"
            )


def stored_bytes(parameter: Tensor, item_bytes: int) -> float:
    """Return the bytes of a parameter: of its elements, or 4 bits each, a byte per block's scale, an element per 256 scales."""
    whole_bytes = parameter.numel() * item_bytes
    return parameter.numel() * (1 / 2 + 1 / 64) + whole_bytes / BLOCK_ELEMENTS if is_nf4(parameter) else whole_bytes


def dequantizing_bytes(parameter: Tensor, item_bytes: int) -> float:
    """Return the bytes beside a 4-bit parameter while torchao makes it whole: 64-bit indices and three whole tensors."""
    return parameter.numel() * (8 + 3 * item_bytes) if is_nf4(parameter) else 0.0
