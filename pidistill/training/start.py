"""The boring part of a recipe: process group, device, seeds, model, optimizer, step, clean exit.

The test for what stands here rather than in a recipe: would two papers differ in it?
"""

import functools
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torchtune import training, utils

from pidistill.config import check_config
from pidistill.distributed.run import Run
from pidistill.distributed.tensor_parallel import check_tensor_parallel, make_mesh
from pidistill.errors import InputError
from pidistill.models.offloading import check_offloading
from pidistill.models.peft_format import check_adapter_dir
from pidistill.training.checkpoint_source import check_checkpoint_fits, check_checkpoint_folder, use_fallback_checkpoint
from pidistill.training.interrupts import Stopped, handle_signals, training_run
from pidistill.training.keys import LEAST
from pidistill.training.run_folder import RESUME, claim_run_folder, public_config

log = utils.get_logger("INFO")


# ---------------------------------------------------------------------------------------------- start and end


def start(cfg: DictConfig, known: frozenset[str], required: Sequence[str]) -> Run:
    """Check the config, join the process group (also for one process), set device, dtype, threads and seeds."""
    if RESUME in known:
        training_run()
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
        if RESUME in known:
            claim_run_folder(cfg, output_dir)
        OmegaConf.save(OmegaConf.create(public_config(cfg)), output_dir / "config.yaml")
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
            with handle_signals():
                return recipe_main(cfg)
        except Stopped as stopped:
            if os.environ.get("RANK", "0") == "0":
                print(f"\n{stopped.sentence}", file=sys.stderr, flush=True)
            cleanup()
            raise
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
