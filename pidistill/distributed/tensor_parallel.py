"""Share each layer's matrices and attention heads among the ranks of one data-parallel rank (tensor parallelism).

torchtune's plan for Llama 3, of which the layers' part is used: queries, keys, values, w1 and w3 by columns, the other two by
rows. FSDP2 shards the layers over the data-parallel ranks, and what stands outside them (embedding, last norm, output head),
with which all tensor-parallel ranks compute the same, over all ranks.

The ranks of a group wait for each other in every layer, so they must make the same forwards. Only the first of them samples,
asks the environment and the judges; the others run the forwards it is about to run, and are given what it got.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torchtune.models.llama3 import base_llama_tp_plan
from torchtune.modules import FeedForward, MultiHeadAttention
from torchtune.training import prepare_mha_for_tp

from pidistill.errors import InputError
from pidistill.models.adapters import has_adapters
from pidistill.models.empty import model_nodes, shared_empty_model
from pidistill.models.modules import attention_modules
from pidistill.models.protocol import Decoder, has_own_names
from pidistill.training.keys import setting

T = TypeVar("T")

DATA, TENSOR = "dp", "tp"
_REPLICAS, _SHARDS = "dp_replicate", "dp_shard"
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "output_proj"), ("w1", "w2", "w3")

# ---------------------------------------------------------------------------------------------- what is refused


def check_tensor_parallel(cfg: DictConfig, processes: int) -> int:
    """Return `tensor_parallel_dim`, 1 where it is not set."""
    size = setting(cfg, "tensor_parallel_dim")
    if size == 1:
        return 1
    if processes % size:
        raise InputError(
            f"tensor_parallel_dim={size} does not divide the {processes} processes of this run into groups of {size}; set "
            "tensor_parallel_dim or --nproc_per_node so that it does"
        )
    _check_settings(cfg, size)
    for key, node in model_nodes(cfg).items():
        _check_model(shared_empty_model(node), key, size)
    return size


def _check_settings(cfg: DictConfig, size: int) -> None:
    for key in ("compile", "enable_activation_offloading"):
        if cfg.get(key, False):
            raise InputError(f"{key}=True does not work with tensor_parallel_dim={size}; set {key}=False")
    optimizer = cfg.get("optimizer") or {}
    if optimizer.get("fused", False) or not str(optimizer.get("_component_", "torch.")).startswith("torch."):
        wrong = "fused=True" if optimizer.get("fused", False) else f"_component_={optimizer._component_}"
        raise InputError(
            f"optimizer.{wrong} does not work with tensor_parallel_dim={size}, whose parameters are sharded in several ways; "
            "choose one of torch.optim, and optimizer.fused=False"
        )
    sampler = str((cfg.get("sampler") or {}).get("_component_", "TorchtuneSampler"))
    if sampler.rpartition(".")[2] != "TorchtuneSampler":
        raise InputError(
            f"sampler._component_={sampler} does not work with tensor_parallel_dim={size}; set "
            "sampler._component_=pidistill.rollouts.TorchtuneSampler"
        )


def _check_model(model: nn.Module, key: str, size: int) -> None:
    if has_adapters(model):
        raise InputError(
            f"{key} has LoRA adapters, which tensor_parallel_dim={size} does not shard; set tensor_parallel_dim=1, or a model "
            "without them"
        )
    if has_own_names(model):
        raise InputError(
            f"tensor_parallel_dim={size} shards torchtune's modules, and this {key} has those of transformers; set "
            "tensor_parallel_dim=1, or model.backend=torchtune where that computes the model"
        )
    for layer in model.layers:
        strange = _unknown_part(layer)
        if strange is not None:
            raise InputError(
                f"tensor_parallel_dim={size} has a plan for layers like Llama's, and this {key} has {strange}; set "
                "tensor_parallel_dim=1"
            )
        counts = {"num_heads": layer.attn.num_heads, "num_kv_heads": layer.attn.num_kv_heads}
        counts |= {"intermediate_dim": layer.mlp.w1.out_features, "embed_dim": layer.attn.embed_dim}
        for name, count in counts.items():
            if count % size:
                raise InputError(
                    f"tensor_parallel_dim={size} gives each process an equal share of {key}.{name}={count}, which it does not "
                    "divide; set a tensor_parallel_dim that does"
                )


def _unknown_part(layer: nn.Module) -> str | None:
    attention, mlp = getattr(layer, "attn", None), getattr(layer, "mlp", None)
    if not isinstance(attention, MultiHeadAttention) or type(mlp) is not FeedForward:
        return f"{type(attention).__name__} and {type(mlp).__name__}"
    for owner, names in ((attention, _ATTENTION), (mlp, _MLP)):
        for name in names:
            if type(getattr(owner, name)) is not nn.Linear:
                return f"{type(getattr(owner, name)).__name__} as {name}"
    wide = [p for norm in _head_norms(layer) for p in norm.parameters() if p.numel() != attention.head_dim]
    return "a norm over several heads" if wide else None


def check_replicas(cfg: DictConfig, processes: int, shares: int) -> int:
    """Return `data_parallel_replicate_dim`, 1 where it is not set; ``shares`` is `tensor_parallel_dim`.

    Raises:
        InputError: the processes do not part into so many groups, or the model has 4-bit weights.
    """
    replicas = setting(cfg, "data_parallel_replicate_dim")
    if processes % (replicas * shares):
        groups = f", each of {shares} processes that share matrices" if shares > 1 else ""
        raise InputError(
            f"data_parallel_replicate_dim={replicas} does not divide the {processes} processes of this run into {replicas} "
            f"equal groups{groups}; set it to the number of machines, or to 1"
        )
    for key, node in model_nodes(cfg).items():
        if replicas > 1 and node.get("quantize_base", False):
            raise InputError(
                f"{key}.quantize_base=True does not work with data_parallel_replicate_dim={replicas}: torchtune loads 4-bit "
                "weights into one group of shards only; set data_parallel_replicate_dim=1"
            )
    return replicas


# ---------------------------------------------------------------------------------------------- model


def make_mesh(device_type: str, processes: int, size: int, replicas: int = 1) -> DeviceMesh:
    """Make the mesh [data-parallel, tensor-parallel]; neighbouring ranks, which are nearest to each other, share a model.

    With several ``replicas`` of the shards the first of the two is [replicas, shards].
    """
    if replicas == 1:
        return init_device_mesh(device_type, (processes // size, size), mesh_dim_names=(DATA, TENSOR))
    sizes = (replicas, processes // (replicas * size), size)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=(_REPLICAS, _SHARDS, TENSOR))
    mesh[_REPLICAS, _SHARDS]._flatten(DATA)
    return mesh


def make_replicas(device_type: str, processes: int, replicas: int) -> DeviceMesh | None:
    """Make the mesh [replicas, shards] of all processes; neighbours, of one machine where possible, hold a replica's shards."""
    if replicas == 1:
        return None
    return init_device_mesh(device_type, (replicas, processes // replicas), mesh_dim_names=(_REPLICAS, _SHARDS))


def parallelize(model: Decoder, mesh: DeviceMesh) -> None:
    """Shard the layers' matrices over the tensor-parallel ranks; ``model`` may be on meta."""
    prepare_mha_for_tp(model, mesh[TENSOR])
    plan = {name: style for name, style in base_llama_tp_plan().items() if name.startswith("layers.")}
    parallelize_module(model, mesh[TENSOR], plan)


def shard_model(
    model: Decoder,
    conditions: Sequence[Callable[[str, nn.Module], bool]],
    *,
    device_type: str,
    cpu_offload: bool,
    reshard_after_forward: bool,
    mesh: DeviceMesh | None = None,
    replicas: DeviceMesh | None = None,
    compute_dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> None:
    """Shard as torchtune's function of that name does, with layers over the data-parallel ranks and all else over all ranks.

    What is outside the layers gets the same gradient on the ranks of a group, so that the mean over all ranks is the mean over
    the data-parallel ones.

    Args:
        mesh: [data-parallel, tensor-parallel]; None where all ranks are data-parallel ones. A single process may shard too:
            then its frozen weights, which need neither gathering nor another dtype, stay what they are.
        replicas: [groups, ranks of a group], where each group holds all shards and gradients are added up over groups too;
            None is one group.
        compute_dtype: of the gathered weights and of their gradients, which are added up over ranks and micro-batches in fp32;
            None leaves all of it in the weights' own dtype.
        frozen: no weight gets gradients once the model is loaded, so that the weights of a layer may have several dtypes.
    """
    processes = dist.get_world_size()
    everyone = replicas or init_device_mesh(device_type, (processes,))
    of_layers = everyone if mesh is None else mesh[DATA] if replicas is None else mesh[_REPLICAS, _SHARDS]
    options: dict[str, Any] = {"reshard_after_forward": reshard_after_forward}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    if compute_dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    if processes == 1:
        options["ignored_params"] = {p for p in model.parameters() if not p.requires_grad}
    for name, module in reversed(list(model.named_modules())):
        if any(condition(name, module) for condition in conditions):
            if compute_dtype is None and not frozen:
                _check_one_dtype(name, module)
            fully_shard(module, mesh=of_layers if name.startswith("layers.") else everyone, **options)
    fully_shard(model, mesh=everyone, **options)


def _check_one_dtype(name: str, module: nn.Module) -> None:
    """Refuse a layer whose trained weights have several dtypes, which FSDP2 cannot gather together."""
    dtypes = {str(p.dtype).removeprefix("torch."): own for own, p in module.named_parameters() if p.requires_grad}
    if len(dtypes) > 1:
        found = " and ".join(f"{dtype} in {own}" for dtype, own in sorted(dtypes.items(), reverse=True))
        raise InputError(
            f"{name} has {found}, as the model's own code wants, and several processes cannot share such a layer; set "
            "dtype=fp32 and compute_dtype=bf16"
        )


def complete_gradients(model: nn.Module) -> None:
    """Add up, before an optimiser step, what each rank's heads give to the norms of queries and keys."""
    group = tensor_parallel_group(model)
    if group is None:
        return
    for norm in _head_norms(model):
        for parameter in norm.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad.to_local(), group=group)


def _head_norms(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the norms over a head's width, one for all heads (Qwen3)."""
    for attention in attention_modules(module):
        if getattr(attention, "q_norm", None) is not None:
            yield from (attention.q_norm, attention.k_norm)


# ---------------------------------------------------------------------------------------------- in lockstep


def tensor_parallel_group(model: Any) -> ProcessGroup | None:
    """Return the ranks that hold a share of the model's matrices together with this one; None where it has them whole."""
    for parameter in model.parameters() if isinstance(model, nn.Module) else ():
        if isinstance(parameter, DTensor) and TENSOR in (parameter.device_mesh.mesh_dim_names or ()):
            return parameter.device_mesh.get_group(TENSOR)
    return None


def follows(group: ProcessGroup | None) -> bool:
    """Return True on all ranks of a group but the first."""
    return group is not None and group.rank() > 0


def from_first(group: ProcessGroup | None, item: T | None = None) -> T:
    """Return, on every rank of the group, the value that its first rank gives."""
    if group is None:
        return item
    box = [item]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


@contextmanager
def in_lockstep(context: Any, group: ProcessGroup | None) -> Iterator[Any]:
    """Return a sampler's context (:class:`pidistill.rollouts.decoding.Context`) whose forwards all ranks of a group make.

    On the first rank the context to sample with; on the others None, once they have made the forwards that it made. Where the
    first one fails they go on waiting: its process ends, and with it the run.
    """
    if follows(group):
        while (calls := from_first(group)) is not None:
            for name, arguments in calls:
                getattr(context, name)(*arguments)
        yield None
    elif group is None:
        yield context
    else:
        yield _Leading(context, group)
        from_first(group, None)


class _Leading:
    """Call the context, and have the other ranks call theirs; one without a forward is sent with the next."""

    def __init__(self, context: Any, group: ProcessGroup) -> None:
        self._context, self._group = context, group
        self._untold: list[tuple[str, tuple]] = []

    def reserve(self, *arguments: Any) -> None:
        self._call("reserve", arguments)

    def rearrange(self, *arguments: Any) -> None:
        self._call("rearrange", arguments)

    def read_prompts(self, *arguments: Any) -> Any:
        return self._call("read_prompts", arguments, forward=True)

    def read(self, *arguments: Any) -> Any:
        return self._call("read", arguments, forward=True)

    def _call(self, name: str, arguments: tuple, *, forward: bool = False) -> Any:
        self._untold.append((name, arguments))
        if forward:
            from_first(self._group, self._untold)
            self._untold = []
        return getattr(self._context, name)(*arguments)
