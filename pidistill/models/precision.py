"""Train weights in fp32 and multiply them in bf16 (`dtype: fp32`, `compute_dtype: bf16`).

A step of AdamW at a learning rate of 5e-6 is smaller than half of a bf16 weight's last bit, which would round it away. So the
trained weights, their gradients and the optimizer's states are in `dtype`, and FSDP2 gives each forward and backward copies of
the weights in `compute_dtype`, layer by layer. With one process this is the same sharding on a mesh of one.

What stays in fp32 all the same: the sums of norms, the softmax, log-probs and divergences, and the logits, whose products add
up in fp32 anyway: rounded to bf16, a logit of 20 would be off by up to 0.06.
"""

import functools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def spread_within_rounding(name: str, weight: Tensor) -> Tensor:
    """Return fp32 values that round to a bf16 ``weight``, spread evenly over those that do; the same for the same ``name``.

    Forwards multiply bf16 copies. The weights of a bf16 file lie in the middle between two borders of rounding, so that a copy
    changes only after half a unit of its last bit: at a learning rate of 5e-6 the model stays as it is for the first ten steps,
    and then lags. Spread, some weights cross a border in each step, and the copies change as the weights do on average. The
    first forward is that of the file. Zeros stay.
    """
    exact = weight.float()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    share = torch.rand(weight.shape, generator=generator).sub_(0.5)
    # |weight| lies in [2^(e-1), 2^e), where neighbours are 2^(e-8) apart.
    spread = torch.ldexp(share, torch.frexp(exact).exponent - 8).add_(exact)
    return torch.where(spread.to(torch.bfloat16) == weight, spread, exact)


def parameter_groups(module: FSDPModule) -> list[Any]:
    """Return FSDP2's groups of the parameters that it gathers together for this module."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = state._fsdp_param_group  # older torch: one group or None
    return [] if group is None else [group]


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


def own_wide_head(model: nn.Module, head: nn.Module) -> Float[Tensor, "V H"] | None:
    """Return the fp32 weight that one process trains, for :func:`multiply_head` on a CPU with AMX; None where a copy is needed.

    The product rounds it as the gathered bf16 weight is, of which it saves an fp32 copy. Without AMX it would not.
    """
    if not isinstance(model, FSDPModule) or next(model.parameters()).is_cuda or not _rounds_factors():
        return None
    for held in (held for group in parameter_groups(model) for held in group.fsdp_params):
        if head in (held._module_info.module, *held._module_info.shared_modules):
            weight = held.sharded_param
            on_cpu = weight.device_mesh.device_type == "cpu"  # offloaded weights are multiplied elsewhere
            whole = on_cpu and weight.device_mesh.size() == 1 and weight.dtype == torch.float32 != compute_dtype_of(model)
            return weight.to_local().detach() if whole else None
    return None


@functools.cache
def _rounds_factors() -> bool:
    """Return True where :func:`bf16_factors` has an effect."""
    fine = torch.full((64, 64), 1 + 2.0**-12)
    with bf16_factors(True):
        return bool((fine @ fine == len(fine)).all())


def multiply_head(
    hidden: Float[Tensor, "M H"], weight: Float[Tensor, "V H"], out: Float[Tensor, "M V"] | None = None
) -> Float[Tensor, "M V"]:
    """Return the logits ``hidden @ weight.T`` in fp32, from factors of the dtype that ``hidden`` has.

    Args:
        weight: what :func:`widen_head` or :func:`own_wide_head` returned.
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
