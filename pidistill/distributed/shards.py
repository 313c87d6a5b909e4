"""Make shards where their data are, and say where a sharded model computes: with `fsdp_cpu_offload` these are two devices."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement


def shard_in_place(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], stride: Sequence[int]
) -> DTensor:
    """Return ``local`` as this process's shard of a tensor of ``shape``, without a copy and on the device where it is.

    ``DTensor.from_local`` moves it to the mesh's device. FSDP then takes the shard back to the CPU, and refuses the tensor
    all the same, because that still says that it is on the mesh's device.
    """
    meta = TensorMeta(shape=torch.Size(shape), stride=tuple(stride), dtype=local.dtype)
    return DTensor(local, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def forward_device(model: nn.Module) -> torch.device:
    """Return the device that forwards of ``model`` run on, also where its shards wait on the CPU for them."""
    parameter = next(model.parameters())
    kind = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device.type
    if kind == parameter.device.type:
        return parameter.device
    return torch.device(kind, torch.cuda.current_device() if kind == "cuda" else None)
