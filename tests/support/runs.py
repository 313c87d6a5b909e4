"""Run recipes in tests: in this process (about a second), or as users do, on the command line."""

import contextlib
import functools
import gc
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from pidistill.envs.tiny_world import dataset
from pidistill.envs.tiny_world.world import World, make_split
from pidistill.models.precision import _rounds_factors
from pidistill.training.checkpoints import STATE_FILE

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny"
# Name of a tiny config → the recipe that its first comment line runs.
RECIPES = {
    path.stem: re.search(r"recipes/(\w+)\.py", path.read_text().split("\n", 1)[0])[1] for path in sorted(TINY.glob("*.yaml"))
}

# One layer of width 32; `tiny_base` in conftest.py makes the weights.
MODEL = {"model.num_layers": 1, "model.embed_dim": 32, "model.intermediate_dim": 64}
ROWS = 64  # of the 512 training tasks; building the prompts of all would take a third of a small run's time
SMALL = MODEL | {
    "dataset.max_rows": ROWS,
    "sampler.max_new_tokens": 16,
    "environment._component_": "tests.support.worlds.VariedEnvironment",
    "eval_dataset": None,
}
SMALL_ROUNDS = SMALL | {
    "max_steps": 4,
    "prompts_per_round": 2,
    "group_size": 3,
    "micro_batch_tokens": 400,
    "rollout_log_steps": 0,
    "save_every_steps": None,
}
SMALL_SFT = SMALL | {"max_steps": 6, "batch_size": 5, "micro_batch_tokens": 150, "save_every_steps": None}
OVERRIDES = {
    "pi_distill_distributed": SMALL_ROUNDS,
    "opsd_distributed": SMALL_ROUNDS,
    "sft_distributed": SMALL_SFT,
    "evaluate_distributed": SMALL,
}
EVALUATION = {  # what turns the evaluation of a small run on again
    "eval_dataset": {"_component_": "pidistill.envs.tiny_world.tiny_world_dataset", "split": "validation", "max_rows": 3},
}

EMA = {"_component_": "pidistill.teachers.EMATeacher", "rate": 0.3}

TIMES = ("time_", "tokens_per_s")


@contextlib.contextmanager
def quick_setup() -> Iterator[None]:
    """Without what takes most of a small run's time: torchtune's gc.collect(), and drawing all tasks of the tiny world anew."""
    gc.collect()
    gc.freeze()
    splits = functools.cache(lambda seed: make_split(World(seed)))
    with mock.patch.object(dataset, "make_split", lambda world: splits(world.seed)):
        yield
    gc.unfreeze()


class Stop(BaseException):
    """Ends a run where a kill would: nothing after it runs, and no `except Exception` catches it."""


def small_config(name: str, base: Path, output_dir: Path, **changes: Any) -> DictConfig:
    """configs/tiny/<name>.yaml, shrunk to milliseconds per step; ``changes`` use `__` for dots."""
    cfg = OmegaConf.load(TINY / f"{name}.yaml")
    settings = OVERRIDES[RECIPES[name]] | {"output_dir": str(output_dir)}
    if name == "base":
        settings = MODEL | {"output_dir": str(output_dir), "max_steps": 2, "batch_size": 4, "dataset.n": 8}
        settings |= {"checkpointer.checkpoint_dir": str(output_dir / "init")}
    else:
        settings |= {"checkpointer.checkpoint_dir": str(base), "checkpointer.checkpoint_files": ["model.safetensors"]}
    if RECIPES[name] == "evaluate_distributed":
        del settings["eval_dataset"]
    for key, value in (settings | {key.replace("__", "."): value for key, value in changes.items()}).items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def sample_config(name: str, base: Path, folder: Path, **changes: Any) -> DictConfig:
    """Return configs/tiny/<name>.yaml on the small model, with three rows and two per batch."""
    cfg = OmegaConf.load(TINY / f"{name}.yaml")
    settings = MODEL | {
        "output_dir": str(folder),
        "checkpointer.checkpoint_dir": str(base),
        "checkpointer.checkpoint_files": ["model.safetensors"],
        "environment._component_": "tests.support.worlds.VariedEnvironment",
        "dataset.max_rows": 3,
        "prompts_per_batch": 2,
        "selection.threshold": 0.5,
    }
    for key, value in (settings | {key.replace("__", "."): value for key, value in changes.items()}).items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def recipe_module(name: str):
    return importlib.import_module(f"recipes.{RECIPES[name]}")


def recipe_class(name: str) -> type:
    (found,) = [value for key, value in vars(recipe_module(name)).items() if key.endswith("Recipe")]
    return found


def run(name: str, cfg: DictConfig, before_training: Callable[[Any], None] | None = None) -> Any:
    """One recipe in this process, without leaving the process group; returns the recipe."""
    recipe = recipe_class(name)(cfg)
    recipe.setup(cfg)
    if RECIPES[name] == "evaluate_distributed":
        recipe.report(recipe.evaluate())
        return recipe
    if RECIPES[name] == "sample_distributed":
        recipe.report(recipe.sample())
        return recipe
    try:
        if before_training is not None:
            before_training(recipe)
        recipe.train()
    except Stop:
        pass
    finally:
        recipe._log.close()
    return recipe


def stop_after_row(step: int) -> Callable[[Any], None]:
    """Kill the run right after it wrote the metrics of ``step``."""

    def prepare(recipe: Any) -> None:
        write = recipe._log.write

        def write_and_stop(row: dict, **kwargs: Any) -> None:
            write(row, **kwargs)
            if row["step"] == step and "loss" in row:
                raise Stop

        recipe._log.write = write_and_stop

    return prepare


def wait_for_row_after_checkpoint(folder: Path, timeout_s: float = 90) -> None:
    """Wait until a run in another process has written a row after its newest checkpoint."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        saved = (folder / "latest").resolve().name
        if saved.startswith("step_"):
            lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
            if json.loads(lines[-1])["step"] > int(saved[5:]):
                return
        time.sleep(0.01)
    pytest.fail(f"no row after a checkpoint within {timeout_s} s")


# ------------------------------------------------------------------------------------------- command line


def environment(**variables: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    return inherited | {"OMP_NUM_THREADS": "1"} | variables


def tune_command(*arguments: str) -> list[str]:
    """`tune ...` of the Python that runs the tests."""
    return [str(Path(sys.executable).parent / "tune"), *arguments]


def pidistill_command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "pidistill"), *arguments]


def shell(command: Sequence[str], cwd: Path = ROOT, timeout_s: float = 600, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def save_config(cfg: DictConfig, path: Path) -> Path:
    OmegaConf.save(cfg, path)
    return path


# ------------------------------------------------------------------------------------------- what a run left


def multiplies_with_amx() -> bool:
    """Return True on a CPU with AMX, where products of bf16 factors round differently in batches of other sizes."""
    return _rounds_factors()


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl without the numbers that a clock decides."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


def weights(output_dir: Path, folder: str = "latest") -> dict[str, torch.Tensor]:
    (file,) = (output_dir / folder).glob("*.safetensors")
    return load_file(file)


def training_state(output_dir: Path, folder: str = "latest") -> dict[str, Any]:
    """What training_state.pt holds, but for Python's random state: the type checker of the tests draws from that stream."""
    state = torch.load(output_dir / folder / STATE_FILE, weights_only=True)
    for rank in state["rng"]:
        del rank["python"]
    return state


def assert_same_tensors(first: Any, second: Any, where: str = "") -> None:
    """Equal to the bit, through nested dicts and lists (a tuple that was saved comes back as a list from some of them)."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same_tensors(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same_tensors(a, b, f"{where}[{i}]")
    else:
        assert first == second, where


def back_to_checkpoint(source: Path, target: Path, step: str = "step_2") -> None:
    """Copy a run as if it had been killed some time after the checkpoint ``step``, before the next one was written."""
    shutil.copytree(source, target, symlinks=True)
    for later in target.glob("step_*"):
        if int(later.name[5:]) > int(step[5:]):
            shutil.rmtree(later)
    shutil.rmtree(target / "episodes", ignore_errors=True)
    (target / "latest").unlink()
    (target / "latest").symlink_to(step)


def assert_close_rows(first: list[dict], second: list[dict], rel: float = 1e-5) -> None:
    assert [row.keys() for row in first] == [row.keys() for row in second]
    for ours, theirs in zip(first, second, strict=True):
        for key in ours:
            # Sums in another order; a loss is a difference of terms of size one, and a mismatch is nothing but rounding.
            least = 1e-5 if key.startswith("sampler_mismatch") else 1e-6
            if key == "alarms":  # their sentences hold numbers, which may round differently
                assert ours[key].keys() == theirs[key].keys()
                continue
            assert ours[key] == pytest.approx(theirs[key], rel=rel, abs=least), (ours["step"], key)
