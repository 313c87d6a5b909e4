"""Start and end a recipe: checks, process group, device, threads, seeds, output folder, clean exit.

What two papers could do differently stands in a recipe; everything else of the start and the end stands here.
"""

import functools
import importlib.util
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from torchtune import training, utils

from pidistill.config import check_command_line, check_config
from pidistill.data.sources import check_sources
from pidistill.distributed.launcher import close_progress_bars, refuse
from pidistill.distributed.machines import check_same_folder, same_refusal_on_all_machines
from pidistill.distributed.run import Run
from pidistill.distributed.tensor_parallel import check_replicas, check_tensor_parallel, make_mesh, make_replicas
from pidistill.errors import InputError, escape_logs, one_line
from pidistill.models.adapter_dir import check_adapter_dir
from pidistill.models.offloading import check_offloading
from pidistill.training.checkpoint_source import check_checkpoint_fits, check_checkpoint_folder, use_fallback_checkpoint
from pidistill.training.compatibility import check_reward
from pidistill.training.disk import is_disk_fault
from pidistill.training.interrupts import Stopped, handle_signals, training_run
from pidistill.training.keys import check_values, setting
from pidistill.training.optimizers import check_mixed_precision, check_sharding
from pidistill.training.run_folder import (
    EVALUATION_FILES,
    RESUME,
    SAMPLING_FILES,
    claim_run_folder,
    holds_run,
    record_config,
    refuse_training_run,
    set_results_aside,
    wants_resume,
)
from pidistill.training.update import check_updates

log = utils.get_logger("INFO")

EVALUATES = "views"  # a key that the recipe which evaluates alone reads


def start(cfg: DictConfig, known: frozenset[str], required: Sequence[str]) -> Run:
    """Check the config, join the process group (also for one process), set device, dtype, threads and seeds."""
    escape_logs(log)
    if RESUME in known:
        training_run()
    with same_refusal_on_all_machines():
        check_run(cfg, known, required)
        use_fallback_checkpoint(cfg)
        for key in ("checkpointer", "teacher_checkpointer"):
            check_checkpoint_folder(cfg, key)
            check_checkpoint_fits(cfg, key)
        check_adapter_dir(cfg)
        device = _device(setting(cfg, "device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = _dtype("dtype", setting(cfg, "dtype"), device)
        compute_dtype = _compute_dtype(cfg, dtype, device)
        processes = _processes()
        if processes > 1 or compute_dtype is not None:
            check_sharding((cfg.get("optimizer") or {}).get("_component_"))
        check_updates(cfg)
        check_offloading(cfg, device, processes)
        shares = check_tensor_parallel(cfg, processes)
        groups = check_replicas(cfg, processes, shares)
        output_dir = make_output_dir(cfg.output_dir)
    if device.type == "cpu":
        torch.set_num_threads(setting(cfg, "threads") or _default_threads(1 + setting(cfg, "rollout_lag")))
    timeout = timedelta(minutes=setting(cfg, "collective_timeout_minutes"))
    if not dist.is_initialized():
        offload = setting(cfg, "fsdp_cpu_offload") and device.type != "cpu"
        backend = training.get_distributed_backend(device.type, offload_ops_to_cpu=offload)
        if training.is_distributed():
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    rank = dist.get_rank()
    mesh = make_mesh(device.type, processes, shares, groups) if shares > 1 else None
    replicas = make_replicas(device.type, processes, groups)
    _wait_at_most(timeout)
    seed = setting(cfg, "seed")
    seed_global_streams(seed)
    run = Run(device, dtype, rank // shares, processes // shares, seed, output_dir, mesh, compute_dtype, replicas)
    check_same_folder(run)
    run.from_main(lambda: _begin_folder(cfg, output_dir, known))
    return run


def _wait_at_most(timeout: timedelta) -> None:
    """Set the timeout of the process groups of a mesh, which have torch's own otherwise, 10 minutes with NCCL."""
    for group in dist.distributed_c10d._world.pg_map:
        if group is not dist.group.WORLD:
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def seed_global_streams(seed: int) -> None:
    """Seed torch, Python and numpy alike on every rank (unlike torchtune's set_seed), for a dataset that shuffles itself."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _begin_folder(cfg: DictConfig, output_dir: Path, known: frozenset[str]) -> None:
    """Claim the run's folder for a training run, or refuse it to any other, and write the config into it, in one process.

    Results of another checkpoint or config, of a recipe that trains nothing, are moved aside.
    A resume may still be refused: its config is written by ``Checkpoints.record_config``, and until then config.yaml remains
    that of the weights in the folder.
    """
    trains = RESUME in known
    if trains:
        claim_run_folder(cfg, output_dir)
    else:
        refuse_training_run(output_dir)
        set_results_aside(cfg, output_dir, EVALUATION_FILES if EVALUATES in known else SAMPLING_FILES)
    if not (trains and wants_resume(cfg) and holds_run(output_dir)):
        record_config(cfg, output_dir)


def _processes() -> int:
    """Return the number of processes, also before they have joined."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if training.is_distributed() else 1


def check_run(cfg: DictConfig, known: frozenset[str], required: Sequence[str]) -> None:
    """Check what can be wrong with a config by itself; take out components that were set to null on the command line."""
    _drop_null_components(cfg)
    OmegaConf.to_container(cfg, resolve=True)  # an interpolation that leads nowhere
    check_config(cfg, known, required)
    check_values(cfg)
    check_reward(cfg)
    if cfg.get("device"):
        _named_device(cfg.device)
    _check_evaluation(cfg, evaluates=EVALUATES in known)
    _check_logger(cfg)


def _check_evaluation(cfg: DictConfig, *, evaluates: bool) -> None:
    """Refuse evaluation rows that nothing answers, and a file of them that a sweep would miss after its trainings.

    The rows of a training may be missing yet: an earlier stage writes them.
    """
    nodes = OmegaConf.to_container(cfg, resolve=True)
    rows, held_out = nodes.get("dataset") or {}, nodes.get("eval_dataset") or {}
    for key, example in (("environment", "pidistill.envs.SingleTurn"), ("sampler", "pidistill.rollouts.TorchtuneSampler")):
        if held_out and not nodes.get(key):
            raise InputError(
                f"config key {key} is missing, and the rows of eval_dataset are answered with it; add {example}, or set "
                "eval_dataset=null"
            )
    if evaluates:
        check_sources("dataset", rows)
    elif held_out.get("source") != rows.get("source"):
        check_sources("eval_dataset", held_out)
    for name, entry in (nodes.get("domains") or {}).items():
        check_sources(f"domains.{name}: dataset", entry.get("dataset") if isinstance(entry, dict) else None)


def _drop_null_components(cfg: DictConfig) -> None:
    """Null the whole node where its name is null: `eval_dataset=null` on torchtune's command line nulls only the name."""
    for key, node in cfg.items_ex(resolve=False):
        if isinstance(node, DictConfig) and node.get("_component_", "") is None:
            cfg[key] = None


# The package that each of torchtune's metric loggers imports when it is built, which is after the weights are loaded.
_LOGGER_PACKAGES = {
    "WandBLogger": "wandb",
    "CometLogger": "comet_ml",
    "TensorBoardLogger": "tensorboard",
    "MLFlowLogger": "mlflow",
}


def _check_logger(cfg: DictConfig) -> None:
    """Refuse a metric logger whose package is not installed."""
    name = cfg.metric_logger._component_ if cfg.get("metric_logger") else ""
    package = _LOGGER_PACKAGES.get(name.rpartition(".")[2]) if name.startswith("torchtune.") else None
    if package and importlib.util.find_spec(package) is None:
        raise InputError(
            f"metric_logger {name} needs the package {package}, which is not installed; run `pip install {package}`"
        )


def make_output_dir(path: str) -> Path:
    """Make the folder of the run and return it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"output_dir={path} cannot be written to ({error.strerror}); set output_dir to another folder"
        ) from error
    return folder


def _default_threads(parts: int = 1) -> int:
    """Return the threads of a process: OMP_NUM_THREADS where one process runs alone, else an equal share of the cores.

    ``parts``: processes of each rank; 2 where another one samples beside the training.

    Two ranks with all threads each are slower than one. torchrun sets OMP_NUM_THREADS to 1 for several ranks, so that it is not
    the user's there. More threads than free cores are much worse than one: they spin while they wait for each other.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    asked = os.environ.get("OMP_NUM_THREADS", "") if ranks == 1 else ""
    return int(asked) if asked.isdecimal() and int(asked) > 0 else max(1, (os.cpu_count() or 1) // (ranks * parts))


def _named_device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"device={name} is not a device of torch ({one_line(error, 200)}); set cuda or cpu") from error


def _device(name: str) -> torch.device:
    """Return torchtune's device; refuse one that the machine lacks, for which torchtune takes the CPU silently."""
    asked = _named_device(name)
    try:
        device = utils.get_device(name)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"device={name} cannot be used ({one_line(error, 200)}); set cuda or cpu") from error
    if device.type != asked.type:
        raise InputError(f"device is {name}, which this machine does not have (it has {device.type}); set device={device.type}")
    return device


def _dtype(key: str, name: str, device: torch.device) -> torch.dtype:
    try:
        return training.get_dtype(name, device=device)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{key}={name} cannot be used on {device.type} ({error}); set {key} to fp32 or bf16") from error


def _compute_dtype(cfg: DictConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """Return `compute_dtype` in mixed precision and None without it."""
    name = setting(cfg, "compute_dtype")
    compute_dtype = _dtype("compute_dtype", name, device) if name else dtype
    if compute_dtype == dtype:
        return None
    if (dtype, compute_dtype) != (torch.float32, torch.bfloat16):
        raise InputError(
            f"compute_dtype={name} does not work with dtype={setting(cfg, 'dtype')}; mixed precision is dtype=fp32 with "
            "compute_dtype=bf16, and without it compute_dtype is null"
        )
    check_mixed_precision((cfg.get("optimizer") or {}).get("_component_"))
    return compute_dtype


def cleanup() -> None:
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    # gloo's threads may outlive the interpreter and abort it (rc 134) unless they get a moment to end.
    time.sleep(0.2)


def one_sentence_errors(recipe_main: Callable[..., Any]) -> Callable[..., Any]:
    """Print an InputError, or a key that cannot be resolved, as one sentence, once, and exit with status 2.

    Stands above torchtune's ``config.parse``, so that a command line that cannot be read is refused in the same way. Any other
    error keeps its traceback.
    """

    @functools.wraps(recipe_main)
    def wrapper(*config: DictConfig) -> Any:
        try:
            with handle_signals():
                if not config:
                    check_command_line(sys.argv[1:])
                return recipe_main(*config)
        except Stopped as stopped:
            if os.environ.get("RANK", "0") == "0":
                close_progress_bars()
                print(f"\n{stopped.sentence}", file=sys.stderr, flush=True)
            cleanup()
            raise
        except (InputError, InterpolationResolutionError) as error:
            refuse(_one_sentence(error), is_first=_first_to_fail())
        except OSError as error:
            if not is_disk_fault(error):
                raise
            print(f"error: {_full_disk(error)}", file=sys.stderr, flush=True)
        cleanup()
        sys.exit(2)

    return wrapper


def _full_disk(error: OSError) -> str:
    what = f"{error.strerror}, {error.filename}" if error.filename else error.strerror
    return (
        f"the disk does not take what the run writes ({what}); every checkpoint so far is whole: free space or "
        f"set output_dir to another disk, then set {RESUME}=true to continue"
    )


def _one_sentence(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    return f"the config cannot be resolved ({one_line(error)}); check its ${{...}}"


def _first_to_fail() -> bool:
    """Return True on exactly one of the ranks that fail: all ranks may have met the same error, or one rank its own."""
    if not dist.is_initialized():  # the config is wrong, which every rank sees
        return os.environ.get("RANK", "0") == "0"
    return dist.distributed_c10d._get_default_store().add("pidistill failed", 1) == 1
