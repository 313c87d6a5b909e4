"""Find what a dotted path of a config names, and say which arguments it takes."""

import difflib
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Collection, Mapping
from typing import Any

from torchtune.config._utils import _get_component_from_path

from pidistill.errors import InputError, one_line

# Where a component is looked for that is named without its module.
STANDARD_PLACES = ("pidistill.objectives", "pidistill.teachers", "pidistill.data", "pidistill.envs", "pidistill.rewards",
                   "pidistill.rollouts", "pidistill.privileged")  # fmt: skip

# Where components of version 0.1 stand now. To be deleted at 1.0.
MOVED = {
    "pidistill.checkpoints.from_scratch": "pidistill.models.from_scratch",
    "pidistill.divergences": "pidistill.losses.divergences",
    "pidistill.envs.tools": "pidistill.envs.function_tools",
    "pidistill.hindsight": "pidistill.privileged",
    "pidistill.hints": "pidistill.rollouts.hints",
    "pidistill.judges": "pidistill.privileged.judges",
    "pidistill.mismatch": "pidistill.scoring.mismatch",
    "pidistill.optimizers": "pidistill.training.optimizers",
    "pidistill.schedules": "pidistill.training.lr_schedules",
    "pidistill.testing.byte_tokenizer": "pidistill.tokenizers.byte_tokenizer",
    "pidistill.token_weights": "pidistill.losses.token_weights",
    "pidistill.traces": "pidistill.rollouts.selections",
}


def resolve(path: str) -> Any:
    """Return the object under a dotted path; modules of the working directory are found, as in torchtune's `instantiate`."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return _get_component_from_path(path)
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # a user's module may fail in any way while it is imported, also with SystemExit
        if (new := _moved(path)) is not None:
            raise InputError(f"component {path} has moved; write {new}") from None
        cause = error.__cause__ or error
        lacking = isinstance(cause, ModuleNotFoundError) and cause.name == path  # the module is there, and not the name
        reason = (_missing_name(path) if lacking else None) or one_line(cause)
        raise InputError(f"component {path} cannot be found ({reason}); check the dotted path") from error


def _missing_name(path: str) -> str | None:
    """Return which file lacks the component and which of its names is closest; None where the module was not imported."""
    parent, _, name = path.rpartition(".")
    if not parent:
        found = [place for place in STANDARD_PLACES if hasattr(importlib.import_module(place), name)]
        return f"it has no module; did you mean {found[0]}.{name}?" if found else None
    module = sys.modules.get(parent)
    if module is None or hasattr(module, name):
        return None
    names = [own for own in vars(module) if not own.startswith("_")]
    return f"{getattr(module, '__file__', None) or parent} has no {name}{closest(name, names)}"


def _moved(path: str) -> str | None:
    """Return the present path of a component of version 0.1, or None where it has not moved."""
    for old, new in MOVED.items():
        if path == old or path.startswith(f"{old}."):
            return new + path.removeprefix(old)
    return None


def parameters_of(component: Any) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a component; none where it has no signature, as some builtins."""
    try:
        return inspect.signature(component).parameters
    except (TypeError, ValueError):
        return {}


def hints_of(component: Any) -> dict[str, Any]:
    """Return the types of a component's arguments; none where they cannot be read."""
    try:
        return typing.get_type_hints(component.__init__ if isinstance(component, type) else component)
    except Exception:  # names that exist for a type checker only, or a callable object
        return {}


def closest(key: str, candidates: Collection[str], none: str = "") -> str:
    """Return the end of a sentence about an unknown ``key``: the most similar candidate, those that there are, or ``none``."""
    if not candidates:
        return none
    matches = difflib.get_close_matches(key, list(candidates), n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]}?"
    nearest = difflib.get_close_matches(key, sorted(candidates), n=12, cutoff=0.0)
    return f"; {'known here' if len(nearest) == len(candidates) else 'the nearest ones are'}: {', '.join(sorted(nearest))}"
