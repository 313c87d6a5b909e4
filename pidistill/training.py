"""The boring part of a recipe: process group, device, seeds, model, optimizer, step, clean exit.

The test for what stands here rather than in a recipe: would two papers differ in it?
"""

import contextlib
import functools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import modules, training, utils
from torchtune.modules import TransformerDecoder

from pidistill.adapters import scale_weights_alone, train_adapters_only, with_initial_adapters
from pidistill.checkpoint_source import check_checkpoint_fits, check_checkpoint_folder, use_fallback_checkpoint
from pidistill.config import build, check_config, empty_model
from pidistill.errors import InputError
from pidistill.nf4 import check_shapes, stored_as_in
from pidistill.offloading import check_offloading, offload_activations
from pidistill.optimizers import check_clipping, clear_gradients, clip_gradients, keep_second_moments_above_zero
from pidistill.peft_format import check_adapter_dir, with_adapter_dir
from pidistill.tensor_parallel import (
    DATA,
    TENSOR,
    check_tensor_parallel,
    complete_gradients,
    from_first,
    make_mesh,
    parallelize,
)
from pidistill.tensor_parallel import shard_model as shard_over_both

log = utils.get_logger("INFO")

T = TypeVar("T")

# Keys that mean the same in every recipe,
EVALUATION_KEYS = frozenset(
    {
        "output_dir", "seed", "device", "dtype", "threads", "model", "tokenizer", "checkpointer", "dataset", "environment",
        "privileged", "sampler", "max_turns", "environment_threads", "environment_timeout_s", "on_overflow", "eval_samples",
        "eval_success_threshold", "fsdp_reshard_after_forward", "fsdp_cpu_offload", "custom_sharded_layers",
        "fallback_checkpoint_dir", "adapter_dir", "tensor_parallel_dim",
    }
)  # fmt: skip
# and in every one that trains.
COMMON_KEYS = EVALUATION_KEYS | frozenset(
    {
        "max_steps", "optimizer", "lr_scheduler", "clip_grad_norm", "max_nonfinite_steps", "save_every_steps",
        "resume_from_checkpoint", "metric_logger", "enable_activation_checkpointing", "enable_activation_offloading",
        "compile", "score_chunk_tokens", "eval_dataset", "eval_every_steps", "packing", "micro_batch_tokens",
        "reward_shaping",
    }
)  # fmt: skip

# Whole numbers, and the least that each may be; null leaves the default.
LEAST = {
    "seed": 0, "threads": 1, "max_steps": 1, "batch_size": 1, "micro_batch_tokens": 1, "prompts_per_round": 1, "group_size": 1,
    "updates_per_round": 1, "minibatch_rollouts": 1, "score_chunk_tokens": 1, "max_turns": 1, "environment_threads": 1,
    "max_nonfinite_steps": 1, "eval_samples": 1, "eval_every_steps": 0, "save_every_steps": 0, "rollout_log_steps": 0,
    "samples_per_prompt": 1, "prompts_per_batch": 1, "rollout_log_samples": 1, "sft_batch_size": 1,
    "rollout_log_max_new_tokens": 1, "rollout_log_max_chars": 1, "tensor_parallel_dim": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Where a recipe runs.

    Attributes:
        rank, world_size: among the data-parallel ranks. Sums and shares are over these; those of a tensor-parallel group have
            the same work, and the same results.
        mesh: [data-parallel, tensor-parallel] ranks; None where `tensor_parallel_dim` is 1.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    seed: int
    output_dir: Path
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0 and self.is_first

    @property
    def is_first(self) -> bool:
        """The one that acts for its tensor-parallel group."""
        return self.mesh is None or self.mesh.get_local_rank(TENSOR) == 0

    @property
    def processes(self) -> int:
        return self.world_size if self.mesh is None else self.mesh.size()

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self.mesh.get_group(DATA)

    def once(self, ask: Callable[[], T]) -> T:
        """``ask()`` by one rank of a tensor-parallel group, for all of them: where two answers could differ, or cost."""
        if self.mesh is None:
            return ask()
        return from_first(self.mesh.get_group(TENSOR), ask() if self.is_first else None)

    def sum(self, value: float | int) -> float:
        """Sum of a number over all ranks (float64)."""
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total, group=self._group)
        return total.item()

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over all ranks of numbers whose names may differ between ranks."""
        if self.world_size == 1:
            return dict(values)
        gathered = self.gather([values])
        names = dict.fromkeys(name for one in gathered for name in one)
        return {name: math.fsum(one.get(name, 0.0) for one in gathered) for name in names}

    def gather(self, items: list) -> list:
        """The items of all ranks, on every rank."""
        if self.world_size == 1:
            return items
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, items, group=self._group)
        return [item for one in gathered for item in one]

    def max(self, value: int) -> int:
        largest = torch.tensor(value, dtype=torch.long, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return int(largest.item())

    def share(self, items: Sequence) -> list:
        """This rank's share of items that every rank holds in the same order."""
        return list(items[self.rank :: self.world_size])


# ---------------------------------------------------------------------------------------------- start and end


def start(cfg: DictConfig, known: frozenset[str], required: Sequence[str]) -> Run:
    """Check the config, join the process group (also for one process), set device, dtype, threads and seeds."""
    check_run(cfg, known, required)
    use_fallback_checkpoint(cfg)
    for key in ("checkpointer", "teacher_checkpointer"):
        check_checkpoint_folder(cfg, key)
        check_checkpoint_fits(cfg, key)
    check_adapter_dir(cfg)
    device = _device(cfg.get("device", "cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _dtype(cfg.get("dtype", "fp32"), device)
    if device.type == "cpu":
        # Two ranks with all threads each are slower than one; results do not depend on it within one run's settings.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(int(cfg.get("threads") or max(1, (os.cpu_count() or 1) // ranks)))
    if not dist.is_initialized():
        if training.is_distributed():
            offload = bool(cfg.get("fsdp_cpu_offload", False)) and device.type != "cpu"
            dist.init_process_group(training.get_distributed_backend(device.type, offload_ops_to_cpu=offload))
        else:
            dist.init_process_group(training.get_distributed_backend(device.type), store=dist.HashStore(), rank=0, world_size=1)
    processes, rank = utils.get_world_size_and_rank()
    check_offloading(cfg, device, processes)
    shares = check_tensor_parallel(cfg, processes)
    mesh = make_mesh(device.type, processes, shares) if shares > 1 else None
    seed = int(cfg.get("seed") or 0)
    # The same on every rank (not torchtune's set_seed), so that a dataset that shuffles itself is the same one on all of them;
    # rollouts have seeds of their own.
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    run = Run(device, dtype, rank // shares, processes // shares, seed, output_dir, mesh)
    if run.is_main:
        OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)
    return run


def check_run(cfg: DictConfig, known: frozenset[str], required: Sequence[str]) -> None:
    """What can be wrong with a config by itself; a component that was set to null on the command line is taken out of it."""
    _drop_null_components(cfg)
    check_config(cfg, known, required)
    _check_numbers(cfg)


def _drop_null_components(cfg: DictConfig) -> None:
    """`eval_dataset=null` on torchtune's command line nulls the component's name only; the whole node is meant."""
    for key, node in cfg.items_ex(resolve=False):
        if isinstance(node, DictConfig) and node.get("_component_", "") is None:
            cfg[key] = None


def _device(name: str) -> torch.device:
    """torchtune's, which takes the CPU where there is no such device: a large run would then crawl without a word."""
    device = utils.get_device(name)
    if device.type != torch.device(name).type:
        raise InputError(f"device is {name}, which this machine does not show (it has {device.type}); set device={device.type}")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    try:
        return training.get_dtype(name, device=device)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"dtype={name} cannot be used on {device.type} ({error}); set dtype to fp32 or bf16") from error


def _check_numbers(cfg: DictConfig) -> None:
    for key, least in LEAST.items():
        value = cfg.get(key)
        if value is not None and (type(value) is not int or value < least):
            raise InputError(f"{key}={value} must be a whole number of at least {least}")
    if cfg.get("packing") not in (None, "tree", "padded"):
        raise InputError(f"packing={cfg.packing} is unknown; choose tree or padded")
    norm = cfg.get("clip_grad_norm")
    if norm is not None and (not isinstance(norm, int | float) or norm <= 0):
        raise InputError(f"clip_grad_norm={norm} must be a number above 0, or null for no clipping")
    limit = cfg.get("environment_timeout_s")
    if limit is not None and (type(limit) not in (int, float) or not 0 < limit < math.inf):
        raise InputError(f"environment_timeout_s={limit} must be a number of seconds above 0, or null for no limit")
    weight = cfg.get("sft_weight")
    if weight is not None and (type(weight) not in (int, float) or not 0 <= weight < math.inf):
        raise InputError(f"sft_weight={weight} must be a number of at least 0; 0 or null for no supervised term")


def cleanup() -> None:
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    # gloo's threads may outlive the interpreter and abort it (rc 134) unless they get a moment to end.
    time.sleep(0.2)


def one_sentence_errors(recipe_main: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Print an InputError as one sentence, once, and exit with status 2; anything else keeps its traceback."""

    @functools.wraps(recipe_main)
    def wrapper(cfg: DictConfig) -> Any:
        try:
            return recipe_main(cfg)
        except InputError as error:
            if _first_to_fail():
                print(f"error: {error}", file=sys.stderr, flush=True)
            cleanup()
            sys.exit(2)

    return wrapper


def _first_to_fail() -> bool:
    """True on exactly one of the ranks that fail: all may have met the same error, or one alone one of its own."""
    if not dist.is_initialized():  # the config is wrong, which every rank sees
        return os.environ.get("RANK", "0") == "0"
    return dist.distributed_c10d._get_default_store().add("pidistill failed", 1) == 1


# ---------------------------------------------------------------------------------------------- model


def load_model(cfg: DictConfig, run: Run, model_node: Any, state_dict: dict[str, Any], *, trained: bool) -> TransformerDecoder:
    """Build a model on the meta device, shard it where there is more than one rank, and fill it from a full state dict.

    ``trained`` models get activation checkpointing, offloading and compilation as the config says; teachers do not. Of a model
    with LoRA adapters these alone can be trained, and a state dict without them starts them anew. With `model.quantize_base`
    the state dict's full weights become 4-bit ones.
    """
    with training.set_default_dtype(run.dtype):
        model = empty_model(model_node)
    train_adapters_only(model)
    scale_weights_alone(model)
    check_shapes(model, run.processes)
    if run.mesh is not None:
        parallelize(model, run.mesh)
    state_dict = with_initial_adapters(model, state_dict, run.seed)
    if trained and cfg.get("compile", False):
        training.compile_model(model, verbose=run.is_main)
    if trained and cfg.get("enable_activation_checkpointing", False):
        training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    if run.processes > 1:
        layers = list(cfg.get("custom_sharded_layers") or [])
        shard = training.shard_model if run.mesh is None else functools.partial(shard_over_both, mesh=run.mesh)
        shard(
            model,
            [functools.partial(training.get_shard_conditions, names_to_match=layers)],
            cpu_offload=cfg.get("fsdp_cpu_offload", False),
            reshard_after_forward=cfg.get("fsdp_reshard_after_forward", True),
        )
    if trained and cfg.get("enable_activation_offloading", False):
        offload_activations(model)
    with training.set_default_dtype(run.dtype), run.device:
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    _fill(model, run, state_dict, cpu_offload=cfg.get("fsdp_cpu_offload", False))
    training.validate_no_params_on_meta_device(model)
    return model.train(trained)


def load_initial(cfg: DictConfig, run: Run) -> TransformerDecoder:
    """The checkpoint's model, with `adapter_dir`'s adapter on it or merged into it; for recipes that train nothing."""
    weights = build(cfg.checkpointer, output_dir=str(run.output_dir)).load_checkpoint()[training.MODEL_KEY]
    return load_model(cfg, run, cfg.model, with_adapter_dir(cfg, cfg.model, weights), trained=False)


def _fill(model: nn.Module, run: Run, state_dict: dict[str, Any], cpu_offload: bool) -> None:
    try:
        if run.processes > 1:
            training.load_from_full_model_state_dict(model, state_dict, run.device, strict=True, cpu_offload=cpu_offload)
        else:
            tensors = {name: t.to(device=run.device, dtype=run.dtype) for name, t in state_dict.items()}
            model.load_state_dict(stored_as_in(model, tensors), strict=True, assign=True)
    except (RuntimeError, KeyError, AttributeError) as error:
        detail = " ".join(str(error).split())[:400]
        raise InputError(
            f"the checkpoint does not fit the model built from `model` ({detail}); check model and checkpointer"
        ) from error


def load_teacher(cfg: DictConfig, run: Run) -> TransformerDecoder:
    """The initial weights again (with `adapter_dir`'s adapter, if there is one), or those of `teacher_checkpointer`."""
    node = cfg.get("teacher_model") or cfg.model
    checkpointer = build(cfg.get("teacher_checkpointer") or cfg.checkpointer, output_dir=str(run.output_dir / ".teacher"))
    weights = checkpointer.load_checkpoint()[training.MODEL_KEY]
    if not cfg.get("teacher_checkpointer"):
        weights = with_adapter_dir(cfg, node, weights)
    return load_model(cfg, run, node, weights, trained=False)


# ---------------------------------------------------------------------------------------------- optimiser step


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    lr: float
    applied: bool


class Updates:
    """Applies accumulated gradients; skips and counts a step whose loss or gradient is not finite, or that has no token."""

    def __init__(self, cfg: DictConfig, run: Run, model: nn.Module) -> None:
        self.run, self.model = run, model
        self.optimizer: Optimizer = build(cfg.optimizer, [p for p in model.parameters() if p.requires_grad])
        self.scheduler: LRScheduler | None = build(cfg.lr_scheduler, self.optimizer) if cfg.get("lr_scheduler") else None
        self.clip_grad_norm = float(cfg.get("clip_grad_norm") or math.inf)
        check_clipping(self.optimizer, self.clip_grad_norm)
        keep_second_moments_above_zero(self.optimizer)
        self.max_nonfinite_steps = int(cfg.get("max_nonfinite_steps") or 3)
        self.nonfinite_steps = 0
        self.nonfinite_in_a_row = 0
        self.empty_steps = 0

    def step(self, loss: float, tokens: int, dump: Callable[[Path], None], step: int) -> StepResult:
        """Clip and step. ``loss`` and ``tokens`` are global, so that all ranks decide alike; ``dump`` writes this rank's batch.

        Without policy tokens there is nothing to learn, and the optimiser's momentum and weight decay must not move weights.
        """
        complete_gradients(self.model)
        grad_norm = clip_gradients(self.model.parameters(), self.clip_grad_norm)
        lr = float(self.optimizer.param_groups[0]["lr"])  # torchao's is a tensor that the scheduler writes into
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        applied = finite and tokens > 0
        self.empty_steps += finite and tokens == 0
        if applied:
            self.optimizer.step()
            self.nonfinite_in_a_row = 0
        elif not finite:
            self._count_nonfinite(loss, grad_norm, dump, step)
        clear_gradients(self.optimizer)
        if self.scheduler is not None:
            self.scheduler.step()
        return StepResult(grad_norm, lr, applied)

    def _count_nonfinite(self, loss: float, grad_norm: float, dump: Callable[[Path], None], step: int) -> None:
        self.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        path = self.run.output_dir / f"nonfinite_step_{step}_rank_{self.run.rank}.jsonl"
        if self.run.is_first:
            dump(path)
        log.warning(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}; its batch is in {path}")
        if self.nonfinite_in_a_row >= self.max_nonfinite_steps:
            raise InputError(
                f"{self.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite (last: loss {loss}, "
                f"gradient norm {grad_norm}); lower optimizer.lr or objective.beta, or raise max_nonfinite_steps; batches are "
                f"in {self.run.output_dir}/nonfinite_step_*.jsonl"
            )


def crossed(every: int | None, before: int, now: int) -> bool:
    """True if a multiple of ``every`` lies in (before, now]; never for None or 0."""
    return bool(every) and now // every > before // every


# ---------------------------------------------------------------------------------------------- timing


class Timer:
    """Seconds by phase. On CUDA each phase ends with a synchronisation, so that time lands where it was spent."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    # Half a surrogate pair, which a model can write, has no UTF-8; its backslash escape is JSON's own.
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
