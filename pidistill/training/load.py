"""Load models from checkpoints: built on the meta device, sharded, filled."""

import functools
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune import training

from pidistill.config import build
from pidistill.data.load import told_later
from pidistill.distributed.run import Run
from pidistill.distributed.shards import shard_in_place
from pidistill.distributed.tensor_parallel import parallelize, shard_model
from pidistill.errors import InputError, one_line
from pidistill.models.adapter_dir import with_adapter_dir
from pidistill.models.adapters import scale_weights_alone, train_adapters_only, with_initial_adapters
from pidistill.models.empty import empty_model, shared_empty_model
from pidistill.models.nf4 import check_shapes, stored_as_in
from pidistill.models.offloading import offload_activations
from pidistill.models.precision import add_up_norms_in_fp32, keep_trained_weights_in, spread_within_rounding
from pidistill.models.progress import PlacedWeights
from pidistill.models.protocol import Decoder, has_own_names
from pidistill.objectives import Objective, RoutedObjective
from pidistill.scoring.stored_teacher import StoredTeacher, identity_of
from pidistill.teachers import LiveTeacher, RoutedTeacher, Teacher
from pidistill.training.compatibility import check_routed_rewards
from pidistill.training.keys import setting
from pidistill.types import Example


def load_model(
    cfg: DictConfig, run: Run, model_node: Any, state_dict: dict[str, Any], *, trained: bool, averaged: bool = False
) -> Decoder:
    """Build a model on the meta device, shard it where there is more than one rank, and fill it from a full state dict.

    ``trained`` models get activation checkpointing, offloading and compilation as the config says; teachers do not. Of a model
    with LoRA adapters only the adapters can be trained; a state dict without adapters gets new ones. With `model.quantize_base`
    the state dict's full weights become 4-bit ones.

    In mixed precision the weights that are trained, or ``averaged`` (an EMA teacher's), are in `dtype` and FSDP2 hands out
    copies of them in `compute_dtype`; all others are in `compute_dtype`. What a bf16 file holds of the first is spread over the
    values that round to it (:func:`spread_within_rounding`).
    """
    moving, several = trained or averaged, run.processes > 1
    with training.set_default_dtype(run.forward_dtype):
        model = empty_model(model_node)
    train_adapters_only(model)
    scale_weights_alone(model)
    mixed = run.is_mixed and moving
    if mixed:
        keep_trained_weights_in(model, run.dtype)
    if run.forward_dtype == torch.bfloat16:
        add_up_norms_in_fp32(model)
    check_shapes(model, run.processes)
    if run.mesh is not None:
        parallelize(model, run.mesh)
    state_dict = with_initial_adapters(model, state_dict, run.seed)
    if trained and setting(cfg, "compile"):
        for layer in model.layers:
            layer.compile(backend=os.environ.get("TORCH_COMPILE_BACKEND", "inductor"))
    if trained and setting(cfg, "enable_activation_checkpointing"):
        training.set_activation_checkpointing(model, auto_wrap_policy={type(layer) for layer in model.layers})
    if several or mixed:
        layers = list(cfg.get("custom_sharded_layers") or [])
        shard_model(
            model,
            [functools.partial(training.get_shard_conditions, names_to_match=layers)],
            device_type=run.device.type,
            cpu_offload=setting(cfg, "fsdp_cpu_offload"),
            reshard_after_forward=setting(cfg, "fsdp_reshard_after_forward"),
            mesh=run.mesh,
            replicas=run.replicas,
            compute_dtype=run.compute_dtype if mixed else None,
            frozen=not moving,
        )
    if trained and setting(cfg, "enable_activation_offloading"):
        offload_activations(model)
    with training.set_default_dtype(run.forward_dtype), run.device:
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    spread = {name for name, p in model.state_dict(keep_vars=True).items() if p.requires_grad} if mixed else set()
    _fill(model, run, state_dict, cpu_offload=setting(cfg, "fsdp_cpu_offload"), spread=spread)
    training.validate_no_params_on_meta_device(model)
    return model.train(trained)


def build_checkpointer(node: Any, model_node: Any, **overrides: Any) -> Any:
    """Build a checkpointer whose state dicts have the names that the model of ``model_node`` has."""
    if has_own_names(shared_empty_model(model_node)):
        overrides["own_names"] = True
    folder = node.get("checkpoint_dir")
    # A run that is still training moves its `latest` to each new checkpoint: all files are read from one of them.
    if folder is not None and Path(folder).is_symlink():
        overrides.setdefault("checkpoint_dir", str(Path(folder).resolve()))
    return build(node, **overrides)


def load_initial(cfg: DictConfig, run: Run) -> Decoder:
    """Load the checkpoint's model, with `adapter_dir`'s adapter on it or merged into it, and freeze it."""
    weights = build_checkpointer(cfg.checkpointer, cfg.model, output_dir=str(run.output_dir)).load_checkpoint()
    weights = weights[training.MODEL_KEY]
    model = load_model(cfg, run, cfg.model, with_adapter_dir(cfg, cfg.model, weights), trained=False)
    return model.requires_grad_(False)


def _keep_buffers(model: nn.Module, names: list[str], device: torch.device) -> None:
    """Make buffers again what torchtune's loader has made trained parameters (Gemma 4's scale of each layer).

    They go to ``device``: with `fsdp_cpu_offload` the loader puts them on the CPU, and FSDP moves parameters only.
    """
    for name in names:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = module._parameters.pop(key, None)
        tensor = module._buffers[key] if tensor is None else tensor
        module.register_buffer(key, tensor.detach().to(device))


def _fill(model: nn.Module, run: Run, state_dict: dict[str, Any], cpu_offload: bool, spread: Collection[str] = ()) -> None:
    """Put the weights of a state dict into a model; those named in ``spread`` that come in bf16 get fp32 values around them.

    With ``cpu_offload`` shards are on the CPU, from where FSDP takes them. Whole weights (of a frozen teacher or base, and of
    one process that trains nothing) are on the run's device in any case.
    """

    def value_of(name: str, weight: Any) -> Any:
        rounded = name in spread and weight.dtype == torch.bfloat16
        return spread_within_rounding(name, weight) if rounded else weight

    try:
        if run.processes > 1:
            weights = PlacedWeights({name: value_of(name, weight) for name, weight in state_dict.items()})
            # Activation checkpointing wraps layers, which shows in the names of buffers and not in a state dict's.
            buffers = [n for n, _ in model.named_buffers() if n.replace("_checkpoint_wrapped_module.", "") in weights]
            training.load_from_full_model_state_dict(model, weights, run.device, strict=True, cpu_offload=cpu_offload)
            _keep_buffers(model, buffers, run.device)
        else:
            wanted = model.state_dict()
            offloaded = {name for name, like in wanted.items() if cpu_offload and isinstance(like, DTensor)}
            devices = dict.fromkeys(offloaded, torch.device("cpu"))
            placed = PlacedWeights(state_dict).items()
            dtypes = {name: like.dtype for name, like in wanted.items()}
            tensors = {name: value_of(name, t).to(devices.get(name, run.device), dtypes.get(name)) for name, t in placed}
            tensors = {name: _whole_shard(t, wanted.get(name)) for name, t in stored_as_in(model, tensors).items()}
            model.load_state_dict(tensors, strict=True, assign=True)
    except (RuntimeError, KeyError, AttributeError) as error:
        detail = one_line(error, 400)
        raise InputError(
            f"the checkpoint does not fit the model built from `model` ({detail}); check model and checkpointer"
        ) from error


def _whole_shard(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Return a full tensor as the only process's shard of it, without a copy, where ``like`` is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return shard_in_place(tensor, like.device_mesh, like.placements, tensor.shape, tensor.stride())


def build_teacher(cfg: DictConfig, examples: Sequence[Example], objective: Objective) -> Teacher:
    """Build `teacher`, the trained model where there is none.

    Refuses a row for which a :class:`RoutedTeacher` or :class:`RoutedObjective` has nothing, parts of the latter that do not go
    together at every step, and a folder with the numbers of another teacher.
    """
    teacher = build(cfg.teacher) if cfg.get("teacher") else LiveTeacher()
    if isinstance(objective, RoutedObjective):
        objective.check_rows(examples, told_later=told_later(cfg))
        check_routed_rewards(cfg, examples, objective)
        objective.check_steps(int(cfg.max_steps))
    for example in examples if isinstance(teacher, RoutedTeacher) else ():
        teacher.name_of(example)
    for name, part in (teacher.teachers if isinstance(teacher, RoutedTeacher) else {None: teacher}).items():
        if isinstance(part, StoredTeacher):
            own, dtype = _nodes_of_teacher(cfg, name), setting(cfg, "compute_dtype") or setting(cfg, "dtype")
            adapter = None if own["teacher_checkpointer"] else cfg.get("adapter_dir")
            nodes = own["teacher_model"] or cfg.model, own["teacher_checkpointer"] or cfg.checkpointer
            part.identify(identity_of(*nodes, dtype, adapter))
    return teacher


def node_of_teacher(nodes: DictConfig | None, name: str | None) -> DictConfig | None:
    """Return the node of a mapping by a teacher's name, which YAML may have read as a number."""
    return {str(key): node for key, node in (nodes or {}).items()}.get(str(name))


def _nodes_of_teacher(cfg: DictConfig, name: str | None) -> dict[str, Any]:
    """Return the model and the checkpointer that the config gives a teacher; None where it takes the student's."""
    keys = ("teacher_model", "teacher_checkpointer")
    return {key: node_of_teacher(cfg.get(f"{key}s"), name) or cfg.get(key) for key in keys}


def load_teacher(cfg: DictConfig, run: Run, teacher: Teacher, name: str | None = None) -> Decoder:
    """Load the initial weights again (with `adapter_dir`'s adapter, if there is one), or those of `teacher_checkpointer`.

    ``name`` is that of one of several teachers, whose nodes are in `teacher_models` and `teacher_checkpointers`.
    """
    own = _nodes_of_teacher(cfg, name)
    node = own["teacher_model"] or cfg.model
    folder = str(run.output_dir / ".teacher")
    checkpointer = build_checkpointer(own["teacher_checkpointer"] or cfg.checkpointer, node, output_dir=folder)
    weights = checkpointer.load_checkpoint()[training.MODEL_KEY]
    if not own["teacher_checkpointer"]:
        weights = with_adapter_dir(cfg, node, weights)
    return load_model(cfg, run, node, weights, trained=False, averaged=teacher.averages)
