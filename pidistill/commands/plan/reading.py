"""Read from a config what the estimates are made of: its forwards, how it trains, and one rank's part of a round."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import training
from torchtune.training.precision import PRECISION_STR_TO_DTYPE

from pidistill.commands.places import keys_of_recipe, learns_demonstrations, load_config, recipe_of
from pidistill.commands.plan.lengths import Lengths
from pidistill.commands.plan.shape import ModelShape, model_shape
from pidistill.commands.plan.workload import Pass, Setup, Workload
from pidistill.components import resolve
from pidistill.config import build, merge
from pidistill.errors import InputError
from pidistill.models.empty import empty_model
from pidistill.scoring.packer import packing_of
from pidistill.scoring.score import list_forwards
from pidistill.scoring.served_teacher import ServedTeacher, without_served
from pidistill.teachers import EMATeacher, LiveTeacher, RoutedTeacher, Teacher, TrustRegionTeacher
from pidistill.training.keys import COMMON_KEYS, ROUND_KEYS, setting
from pidistill.training.optimizers import cpu_offload
from pidistill.training.round_sampler import device_place
from pidistill.training.rounds import RoundSizes
from pidistill.training.start import check_run
from pidistill.types import ScoreRequest

KEYS = COMMON_KEYS | ROUND_KEYS | {"hindsight", "batch_size"}
SFT_REQUEST = ScoreRequest(student_grad=True, teacher_grad=False, views=("student",))


def merged(config: str, overrides: Sequence[str]) -> DictConfig:
    """Return a bundled config or a file, with overrides as torchtune's command line takes them."""
    return merge(config, load_config(config), overrides)


def read(config: str, overrides: Sequence[str]) -> DictConfig:
    """Return the config as a run would read it; refuse wrong keys and numbers as there."""
    known, required = keys_of_recipe(recipe_of(config)) or (KEYS, ("model", "tokenizer", "dataset"))
    if "optimizer" not in required:
        raise InputError(f"config {config} trains nothing; plan one of a recipe that trains")
    cfg = merged(config, overrides)
    check_run(cfg, known, required)
    return cfg


def setup_of(cfg: DictConfig, ranks: int, device: str) -> Setup:
    """Return how the config trains: models, forwards, optimizer states, sharding."""
    model, trained = shape_of(cfg.model, dtype_of(cfg)), _named_dtype(cfg, "dtype")
    mixed = trained != dtype_of(cfg)
    teacher = build(cfg.teacher) if cfg.get("teacher") else LiveTeacher()
    objective = build(cfg.objective) if cfg.get("objective") else None
    request = objective.score_request(0) if objective else SFT_REQUEST
    behaviour = objective.behaviour_request() if objective else None
    own = _teacher_shapes(cfg, teacher)
    return Setup(
        model=model,
        update=tuple(list_passes(request, teacher, model, own)),
        behaviour=tuple(list_passes(behaviour, teacher, model, own)) if behaviour else (),
        teacher_bytes=sum(shape.weights_bytes for shape in own.values()),
        average_elements=model.trained * sum(isinstance(one, EMATeacher) for one in by_name(teacher).values()),
        state_bytes=_state_bytes(cfg.optimizer, trained.itemsize),
        mixed=mixed,
        ranks=ranks,
        replicas=setting(cfg, "data_parallel_replicate_dim"),
        reshard=setting(cfg, "fsdp_reshard_after_forward"),
        cpu_offload=setting(cfg, "fsdp_cpu_offload") and (ranks > 1 or mixed),
        checkpointing=setting(cfg, "enable_activation_checkpointing"),
        device=device,
        samples_beside=bool(setting(cfg, "rollout_lag")) and _samples_on(cfg, cfg.get("device") or device),
    )


def _samples_on(cfg: DictConfig, device: str) -> bool:
    """Return whether the process of `rollout_lag` samples on the device of the training; each of several has a number."""
    name = cfg.get("rollout_device")
    return not name or device_place(name) == device_place(device, "device")


def by_name(teacher: Teacher) -> Mapping[str, Teacher]:
    """Return the teachers of a RoutedTeacher by name; any other teacher under the name ""."""
    return teacher.teachers if isinstance(teacher, RoutedTeacher) else {"": teacher}


def _teacher_shapes(cfg: DictConfig, teacher: Teacher) -> dict[str, ModelShape]:
    """Return the sizes of each teacher that has weights beside the trained model's, by name."""
    nodes = {"": cfg.get("teacher_model")} | {str(name): node for name, node in (cfg.get("teacher_models") or {}).items()}
    named = by_name(teacher).items()
    return {name: shape_of(nodes.get(name) or cfg.model, dtype_of(cfg)) for name, one in named if one.own_weights}


def list_passes(request: ScoreRequest, teacher: Teacher, model: ModelShape, own: Mapping[str, ModelShape]) -> Iterator[Pass]:
    """Yield the scorer's forwards of ``request``, each with the model that computes it.

    ``own`` has the teachers with weights beside the trained ones, by name. What a server computes is not a forward of this run,
    and each of several teachers is taken to read the same share of the rows.
    """
    if isinstance(teacher, ServedTeacher):
        request = without_served(request, teacher)
    forwards, teachers = list_forwards(request, live_teacher=teacher.live), by_name(teacher)
    yield from (Pass(model, (view,)) for view in forwards.constant)
    if forwards.given is not None:
        share, needed = 1.0 / len(teachers), "teacher" not in forwards.called  # else the trained model's forward is at hand
        for name, one in teachers.items():
            if needed or not one.live:
                yield Pass(own.get(name, model), ("teacher",), share=share)
            if isinstance(one, TrustRegionTeacher) and needed:  # its other part: the trained model
                yield Pass(model, ("teacher",), share=share)
    if forwards.called:
        yield Pass(model, forwards.called, forwards.gradient)


def workload_of(cfg: DictConfig, lengths: Lengths, ranks: int) -> Workload:
    """Return one rank's part of a round, the busiest rank's where prompts do not divide."""
    common = {
        **dataclasses.asdict(lengths),
        "packing": packing_of(cfg),
        "micro_batch_tokens": setting(cfg, "micro_batch_tokens"),
        "chunk_tokens": cfg.get("score_chunk_tokens"),
    }
    if learns_demonstrations(cfg):
        return Workload(group_size=1, groups=0, trained_groups=-(-cfg.batch_size // ranks), views=SFT_REQUEST.views, **common)
    sizes = RoundSizes(cfg)
    objective = build(cfg.objective)
    return Workload(
        group_size=sizes.group_size,
        groups=-(-sizes.prompts // ranks),
        trained_groups=-(-sizes.minibatch // sizes.group_size // ranks),
        updates=sizes.updates,
        views=objective.score_request(0).views,
        sampled_view=objective.sampling_view(),
        sampler_rows=cfg.sampler.get("max_batch_size"),
        **common,
    )


def dtype_of(cfg: DictConfig) -> torch.dtype:
    """Return the dtype that forwards compute in, found by its name: the run may be planned on a machine that cannot run it."""
    return _named_dtype(cfg, "compute_dtype" if cfg.get("compute_dtype") else "dtype")


def _named_dtype(cfg: DictConfig, key: str) -> torch.dtype:
    name = cfg.get(key) or "fp32"
    if name not in ("fp32", "bf16"):
        raise InputError(f"{key}={name} cannot be planned; set {key} to fp32 or bf16")
    return PRECISION_STR_TO_DTYPE[name]


def shape_of(node: Any, dtype: torch.dtype) -> ModelShape:
    """Return the sizes of the model that a component builds."""
    return _cached_shape(json.dumps(OmegaConf.to_container(node, resolve=True), sort_keys=True), dtype)


@cache
def _cached_shape(node: str, dtype: torch.dtype) -> ModelShape:
    with training.set_default_dtype(dtype):
        return model_shape(empty_model(json.loads(node)))


def _state_bytes(node: DictConfig, item_bytes: int) -> float:
    """Return the bytes of optimizer state per trained element, counted on a parameter that takes one step."""
    if resolve(node._component_) is cpu_offload:
        return 0.0
    parameter = torch.nn.Parameter(torch.zeros(2**18, dtype={2: torch.bfloat16, 4: torch.float32}[item_bytes]))
    optimizer = build(node, [parameter])
    parameter.grad = torch.ones_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    states = (x for x in optimizer.state[parameter].values() if isinstance(x, torch.Tensor) and x.numel() > 1)
    return sum(x.untyped_storage().nbytes() for state in states for x in _stored(state)) / parameter.numel()


def _stored(state: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that hold a state: several where it has a type of its own, as torchao's in 8 bits."""
    return [getattr(state, name) for name in state.__tensor_flatten__()[0]] if hasattr(state, "__tensor_flatten__") else [state]
