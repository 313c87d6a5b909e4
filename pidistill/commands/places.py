"""Find recipes and configs, and read what a config says before anything is built of it."""

import difflib
import functools
import importlib.util
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pidistill.config import read_yaml
from pidistill.errors import InputError


def folders() -> tuple[Path, Path]:
    """Return (recipes, configs): inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    root = package if (package / "recipes").is_dir() else package.parent
    return root / "recipes", root / "configs"


def config_path(name: str) -> Path:
    """Return the path of a file, or of a bundled config by its name."""
    candidates = [Path(name), folders()[1] / f"{name}.yaml", folders()[1].parent / name]
    for path in candidates:
        if path.is_file():
            return path
    bundled = [str(path.relative_to(folders()[1]).with_suffix("")) for path in sorted(folders()[1].rglob("*.yaml"))]
    advice = suggestion(name.removeprefix("configs/").removesuffix(".yaml"), bundled) or "; `pidistill ls` lists those"
    raise InputError(f"config {name} is neither a file nor a bundled config{advice}")


def suggestion(name: str, known: Collection[str]) -> str:
    """Return the end of a sentence about an unknown ``name``: the most similar of those known, "" where none is similar.

    It asks for more than :func:`pidistill.components.closest`, whose limit takes `nosuch` for tiny/opsd_ucla.
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def load_config(name: str) -> DictConfig:
    """Return the config as it is now; do not change it. A file is read once, since a sweep asks thousands of times."""
    path = config_path(name)
    state = path.stat()
    return _load(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=256)
def _load(path: Path, _mtime_ns: int, _size: int) -> DictConfig:
    return read_yaml(path)


def recipe_of(name: str) -> str:
    """Return the recipe in the command of a config's first line: a bundled one by name, another one by its path.

    As in `pidistill run`, a Python file of the working folder comes before the bundled recipe of its name; a bundled config's
    line names the bundled recipe.
    """
    path = config_path(name)
    first = path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
    found = re.match(r"#.*\brun\b(?:\s+--nproc_per_node[ =]\d+)?\s+(\S+)\s+--config\s", first)
    if not found:
        raise InputError(
            f"config {name} does not say its recipe; begin it with a line like `# tune run --nproc_per_node 1 "
            f"recipes/opsd_distributed.py --config {name}`"
        )
    recipe, (recipes, configs) = Path(found[1]), folders()
    bundled = recipes / f"{recipe.stem}.py"
    if recipe.parent.name not in ("", "recipes") or not bundled.is_file():
        return found[1]
    is_own = recipe.suffix == ".py" and recipe.is_file() and not recipe.samefile(bundled)
    return found[1] if is_own and not path.resolve().is_relative_to(configs.resolve()) else recipe.stem


@functools.cache
def keys_of_recipe(recipe: str) -> tuple[frozenset[str], tuple[str, ...]] | None:
    """Return the keys that a recipe of :func:`recipe_of` knows and those that it requires; None where it does not list them."""
    path = folders()[0] / f"{recipe}.py" if not recipe.endswith(".py") else Path(recipe)
    if not path.is_file():  # one of torchtune's own
        return None
    spec = importlib.util.spec_from_file_location(f"_checked_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return (module.KEYS, module.REQUIRED) if hasattr(module, "KEYS") and hasattr(module, "REQUIRED") else None


def is_supervised(name: str, config: DictConfig) -> bool:
    """Return whether a config's recipe (by its first line, else by its keys) trains only on the dataset's completions."""
    try:
        recipe = recipe_of(name)
    except InputError:
        recipe = ""
    bundled = (folders()[0] / f"{recipe}.py").is_file()
    return recipe == "sft_distributed" if bundled else learns_demonstrations(config)


def learns_demonstrations(config: DictConfig) -> bool:
    """Return whether a config has the key `batch_size`, which only the supervised one of the bundled recipes takes."""
    return "batch_size" in config


def has_key(config: str, key: str) -> bool:
    """Return True if the config has the dotted key, also with the value null."""
    node: Any = load_config(config)
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118 (`in node` is False for null)
            return False
        node = node._get_node(part)
    return True
