"""Configs: every key is read by something, every component binds, nested components are built."""

import difflib
import functools
import inspect
import math
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune.config._errors import InstantiationError
from torchtune.config._instantiate import _get_component_from_path

from pidistill.errors import InputError

COMPONENT = "_component_"

# What recipes add to a component's own arguments: how many positional ones, and which keywords.
ADDED_ARGUMENTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "optimizer": (1, ()),  # parameters
    "lr_scheduler": (1, ()),  # optimizer
    "checkpointer": (0, ("output_dir",)),
    "teacher_checkpointer": (0, ("output_dir",)),
}

# Keys whose value may be a plain function of an example and of the turns of its episode, and keys whose entries may be one.
FUNCTION_KEYS, FUNCTIONS_KEYS = ("reward", "sibling", "feedback"), ("checks",)


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


def build(node: Any, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a component node, its nested component nodes first (torchtune 0.6.1 leaves those as dicts).

    A node that is not a component comes back as plain containers; positional and keyword arguments are added to the call. A
    reward may be a plain function (:data:`FUNCTION_KEYS`), as a dotted path or as a component: it is not called, but comes back
    with its other arguments filled in.
    """
    if isinstance(node, (DictConfig, ListConfig)):
        node = OmegaConf.to_container(node, resolve=True)
    return _build(node, "", args, kwargs)


def _build(node: Any, path: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = MappingProxyType({})) -> Any:
    if isinstance(node, str) and _may_be_function(path):
        node = {COMPONENT: node}
    if isinstance(node, Mapping) and COMPONENT in node:
        arguments = {key: _build(value, f"{path}.{key}") for key, value in node.items() if key != COMPONENT}
        component = resolve(node[COMPONENT])
        if _may_be_function(path) and _is_used_as_it_is(component, arguments):
            return functools.partial(component, **arguments) if arguments else component
        return component(*args, **{**arguments, **kwargs})
    if isinstance(node, Mapping):
        return {key: _build(value, f"{path}.{key}") for key, value in node.items()}
    if isinstance(node, list):
        return [_build(value, f"{path}[]") for value in node]
    return node


def _may_be_function(path: str) -> bool:
    """Return whether a plain function may stand under a config key."""
    parent, _, key = path.rpartition(".")
    return key in FUNCTION_KEYS or parent.rpartition(".")[2] in FUNCTIONS_KEYS


def _is_used_as_it_is(component: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether a component is a function that needs more than ``arguments``; one that does not makes what is used."""
    if inspect.isclass(component):
        return False
    try:
        inspect.signature(component).bind(**arguments)
    except TypeError:
        return True
    return False


def _check_function(path: str, name: str, function: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a function that cannot be called with an example and turns."""
    try:
        inspect.signature(function).bind(None, None, **arguments)
    except TypeError as error:
        raise InputError(
            f"{path}: {name} cannot be called with an example and the turns of its episode ({error}); define it as "
            f"def {name.rpartition('.')[2]}(example, turns)"
        ) from None


def resolve(path: str) -> Any:
    """The object under a dotted path; modules of the working directory are found, as in torchtune's own `instantiate`."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return _get_component_from_path(path)
    except (InstantiationError, ValueError) as error:
        if (new := _moved(path)) is not None:
            raise InputError(f"component {path} has moved; write {new}") from None
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"component {path} cannot be found ({reason}); check the dotted path") from error


def _moved(path: str) -> str | None:
    """Return the present path of a component of version 0.1, or None where it has not moved."""
    for old, new in MOVED.items():
        if path == old or path.startswith(f"{old}."):
            return new + path.removeprefix(old)
    return None


def check_config(cfg: DictConfig, known: Collection[str], required: Collection[str] = ()) -> None:
    """Refuse a key that nothing reads, naming the closest real one, and a component whose arguments are unknown or missing.

    Top-level keys outside ``known`` may only serve interpolation (``${key}``) elsewhere in the config.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    interpolated = set(re.findall(r"\$\{([A-Za-z_]\w*)", str(raw)))
    for key in raw:
        if key not in known and key not in interpolated:
            raise InputError(f"config key {key} is read by nothing in this recipe{_closest(key, known)}")
    for key in required:
        if raw.get(key) is None:
            raise InputError(f"config key {key} is missing; this recipe needs it")
    for key, node in raw.items():
        _check_component(key, node)
        if not (isinstance(node, float) and math.isinf(node)):  # the table of keys says where infinity is a value
            _check_finite(key, node)


def _check_component(path: str, node: Any) -> None:
    if isinstance(node, list):
        for i, value in enumerate(node):
            _check_component(f"{path}[{i}]", value)
    if isinstance(node, str) and _may_be_function(path) and "${" not in node:
        node = {COMPONENT: node}
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        _check_component(f"{path}.{key}", value)
    if COMPONENT not in node:
        return
    if not isinstance(node[COMPONENT], str):
        raise InputError(
            f"config key {path}._component_ is {node[COMPONENT]}, not a dotted path; on the command line, write "
            f"{path}=dotted.path and {path}.argument=value"
        )
    component = resolve(node[COMPONENT])
    try:
        parameters = inspect.signature(component).parameters
    except ValueError:  # some builtins have none
        return
    for key in parameters.keys() & node.keys():
        _check_argument(f"{path}.{key}", node[key], parameters[key])
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in node:
            if key != COMPONENT and key not in parameters:
                raise InputError(f"config key {path}.{key} is not an argument of {node[COMPONENT]}{_closest(key, parameters)}")
    given = {key: value for key, value in node.items() if key != COMPONENT}
    if _may_be_function(path) and _is_used_as_it_is(component, given):
        return _check_function(path, node[COMPONENT], component, given)
    positional, keywords = ADDED_ARGUMENTS.get(path, (0, ()))
    for parameter in list(parameters.values())[positional:]:
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and parameter.name not in node and parameter.name not in keywords:
            raise InputError(f"config key {path}.{parameter.name} is missing; {node[COMPONENT]} needs it")


def _check_argument(path: str, value: Any, parameter: inspect.Parameter) -> None:
    """Refuse text in place of a number, and null in place of a number that the component needs."""
    annotation = "" if parameter.annotation is parameter.empty else inspect.formatannotation(parameter.annotation)
    names = set(re.findall(r"\w+", annotation))
    has_number = type(parameter.default) in (int, float)
    if not (has_number or annotation in ("int", "float")) or names & {"str", "Literal", "Any", "object"}:
        return
    interpolated = isinstance(value, str) and "${" in value
    needs_value = parameter.default is not None and annotation in ("int", "float")
    if (isinstance(value, str) and not interpolated) or (value is None and needs_value):
        raise InputError(f"{path}={'null' if value is None else value} must be a number")


def _check_finite(path: str, node: Any) -> None:
    """Refuse NaN, and infinity unless it is the default of the component's argument."""
    if isinstance(node, float) and not math.isfinite(node):
        raise InputError(f"config key {path} is {node}; set it to a finite number")
    if isinstance(node, list):
        for i, value in enumerate(node):
            _check_finite(f"{path}[{i}]", value)
    if isinstance(node, dict):
        unbounded = _infinite_defaults(node.get(COMPONENT))
        for key, value in node.items():
            if not (value == math.inf and key in unbounded):
                _check_finite(f"{path}.{key}", value)


def _infinite_defaults(component: str | None) -> set[str]:
    """Return the arguments of a component whose default is infinity."""
    try:
        parameters = inspect.signature(resolve(component)).parameters if component else {}
    except ValueError:  # some builtins have no signature
        return set()
    return {
        name for name, parameter in parameters.items() if isinstance(parameter.default, float) and parameter.default == math.inf
    }


# Keys of earlier versions, and what does their work now.
_REPLACED = {"micro_batch_rollouts": "micro_batch_tokens", "micro_batch_size": "micro_batch_tokens"}


def _closest(key: str, candidates: Collection[str]) -> str:
    if _REPLACED.get(key) in candidates:
        return f"; set {_REPLACED[key]} in its place"
    matches = difflib.get_close_matches(key, list(candidates), n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]}?"
    nearest = difflib.get_close_matches(key, sorted(candidates), n=12, cutoff=0.0)
    return f"; {'known here' if len(nearest) == len(candidates) else 'the nearest ones are'}: {', '.join(sorted(nearest))}"
