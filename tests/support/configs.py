"""List the configs under configs/, and ask one config all questions of a test before it fails."""

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from pidistill.training.keys import EVALUATION_KEYS
from tests.support.folder_families import FOLDER_FAMILIES
from tests.support.runs import ROOT

CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweeps")
FAMILIES = ("qwen3", "qwen2_5", "llama3_2", "r1_distill_llama")
SIZED = [path for path in CONFIGS if path.parent.name in FAMILIES]  # with the sizes of the model
FROM_FOLDER = [path for path in CONFIGS if path.parent.name in FOLDER_FAMILIES]  # with the model that a folder describes
REAL = SIZED + FROM_FOLDER
TINY = [path for path in CONFIGS if path.parent.name == "tiny"]

Question = Callable[[Path], None]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def load(path: Path) -> DictConfig:
    """Return the config, which several tests share: copy it before a change."""
    cfg = OmegaConf.load(path)
    OmegaConf.set_readonly(cfg, True)
    return cfg


def recipe_of(path: Path) -> str:
    """Return the recipe's name in the command that the first line gives."""
    first = text_of(path).split("\n", 1)[0]
    command = re.fullmatch(r"# tune run --nproc_per_node \d+ recipes/(\w+)\.py --config (\S+)", first)
    assert command, f"{path} does not begin with the command that runs it: {first!r}"
    assert command[2] == str(path.relative_to(ROOT)), f"{path} names another config: {first!r}"
    return command[1]


def ranks_of(path: Path) -> int:
    """Return the number of processes in the command that the first line gives."""
    return int(re.search(r"--nproc_per_node (\d+)", text_of(path))[1])


def keys_of(path: Path) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the keys that the config's recipe reads, and those that it needs."""
    module = importlib.import_module(f"recipes.{recipe_of(path)}")
    return getattr(module, "KEYS", EVALUATION_KEYS), module.REQUIRED


def assert_no_failures(path: Path, questions: Sequence[Question]) -> None:
    """Ask all ``questions`` about the config; fail with every one that fails, not only the first."""
    failures = []
    for question in questions:
        try:
            question(path)
        except Exception as error:
            failures.append(f"{question.__name__}: {type(error).__name__}: {error}")
    assert not failures, f"{name_of(path)}\n" + "\n".join(failures)
