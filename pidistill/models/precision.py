"""Train weights in fp32 and multiply them in bf16 (`dtype: fp32`, `compute_dtype: bf16`).

A step of AdamW at a learning rate of 5e-6 is smaller than half of a bf16 weight's last bit, which would round it away. So the
trained weights, their gradients and the optimizer's states are in `dtype`, and FSDP2 gives each forward and backward copies of
the weights in `compute_dtype`, layer by layer. With one process this is the same sharding on a mesh of one.

What stays in fp32 all the same: the sums of norms, the softmax, log-probs and divergences, and the logits, whose products add
up in fp32 anyway: rounded to bf16, a logit of 20 would be off by up to 0.06.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torchtune.modules import RMSNorm


def keep_trained_weights_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters that are trained another dtype, and leave the frozen ones; ``model`` may be on the meta device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                module.register_parameter(name, nn.Parameter(parameter.detach().to(dtype)))


def compute_dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model's forward multiplies in."""
    gathered = model._get_fsdp_state()._mp_policy.param_dtype if isinstance(model, FSDPModule) else None
    return gathered or next(model.parameters()).dtype


def add_up_norms_in_fp32(model: nn.Module) -> None:
    """Let every RMSNorm scale in fp32 too, with a scale of any dtype.

    torchtune's own forward gives torch an fp32 input and a bf16 scale, which has no fused kernel and warns at every start.
    """
    for module in model.modules():
        if type(module) is RMSNorm:
            module.forward = functools.partial(_normalize, module)


def _normalize(norm: RMSNorm, x: Tensor) -> Tensor:
    if x.dtype == norm.scale.dtype:  # torch's kernel adds up and scales in fp32, and rounds once
        return F.rms_norm(x, norm.normalized_shape, norm.scale, norm.eps)
    return F.rms_norm(x.float(), norm.normalized_shape, norm.scale.float(), norm.eps).to(x.dtype)


# ---------------------------------------------------------------------------------------------- logits


def widen_head(weight: Float[Tensor, "V H"]) -> Float[Tensor, "V H"]:
    """Return the head's weight as :func:`multiply_head` wants it: on CPU in fp32, as torch has no product of bf16 into fp32."""
    return weight.float() if weight.dtype == torch.bfloat16 and not weight.is_cuda else weight


def multiply_head(
    hidden: Float[Tensor, "M H"], weight: Float[Tensor, "V H"], out: Float[Tensor, "M V"] | None = None
) -> Float[Tensor, "M V"]:
    """Return the logits ``hidden @ weight.T`` in fp32, from factors of the dtype that ``hidden`` has.

    Args:
        weight: what :func:`widen_head` returned.
        out: where to write them.
    """
    if weight.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    with bf16_factors(hidden.dtype == torch.bfloat16):
        return torch.mm(hidden.to(weight.dtype), weight.T, out=out)


@contextmanager
def bf16_factors(yes: bool) -> Iterator[None]:
    """Let fp32 products on a CPU with AMX round their factors to bf16, several times faster; sums and results stay in fp32."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    try:
        if yes:
            setting.fp32_precision = "bf16"
        yield
    finally:
        if yes:
            setting.fp32_precision = before
