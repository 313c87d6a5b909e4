"""Configs: every key is read by something, every component binds, nested components are built."""

import difflib
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune.config._instantiate import _get_component_from_path
from torchtune.config._errors import InstantiationError

from pidistill.errors import InputError

COMPONENT = "_component_"


def build(node: Any, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a component node, its nested component nodes first (torchtune 0.6.1 leaves those as dicts).

    A node that is not a component comes back as plain containers; positional and keyword arguments are added to the call.
    """
    if isinstance(node, (DictConfig, ListConfig)):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, Mapping) and COMPONENT in node:
        arguments = {key: build(value) for key, value in node.items() if key != COMPONENT}
        return resolve(node[COMPONENT])(*args, **{**arguments, **kwargs})
    if isinstance(node, Mapping):
        return {key: build(value) for key, value in node.items()}
    if isinstance(node, list):
        return [build(value) for value in node]
    return node


def resolve(path: str) -> Any:
    try:
        return _get_component_from_path(path)
    except (InstantiationError, ValueError) as error:
        raise InputError(f"component {path} cannot be found ({_first_line(error)}); check the dotted path") from error


def check_config(cfg: DictConfig, known: Collection[str], required: Collection[str] = ()) -> None:
    """Refuse a key that nothing reads, naming the closest real one, and a component that does not bind to its arguments.

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


def _check_component(path: str, node: Any) -> None:
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        _check_component(f"{path}.{key}", value)
    if COMPONENT not in node:
        return
    component = resolve(node[COMPONENT])
    try:
        parameters = inspect.signature(component).parameters
    except ValueError:  # some builtins have none
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in node:
        if key != COMPONENT and key not in parameters:
            raise InputError(f"config key {path}.{key} is not an argument of {node[COMPONENT]}{_closest(key, parameters)}")


def _closest(key: str, candidates: Collection[str]) -> str:
    matches = difflib.get_close_matches(key, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else f"; known here: {', '.join(sorted(candidates))}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
