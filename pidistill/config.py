"""Read, check and build configs: every key is read by something, every component binds, nested components are built."""

import argparse
import functools
import inspect
import math
import re
import traceback
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune.config._utils import _merge_yaml_and_cli_args

from pidistill.annotations import accepts, demanded
from pidistill.components import closest, hints_of, parameters_of, resolve
from pidistill.errors import InputError, bounded_repr, one_line

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

# Arguments of model builders and tokenizers that count something of which there is at least one.
_SIZE = re.compile(r"num_layers|num_heads|num_kv_heads|embed_dim|head_dim|intermediate_dim|vocab_size|max_seq_len|lora_rank")


def check_command_line(words: Sequence[str]) -> None:
    """Refuse a recipe's command line that torchtune's ``config.parse`` would answer with a traceback."""
    rest = list(words)
    name = next((word.partition("=")[2] for word in words if word.startswith("--config=")), None)
    if "--config" in rest:
        at = rest.index("--config")
        name = rest[at + 1] if at + 1 < len(rest) else None
        del rest[at : at + 2]
    if {"-h", "--help"} & set(rest):
        return
    if name is None:
        raise InputError("a run needs --config and the name of a config file")
    flags = [word for word in rest if word.startswith("-") and not word.startswith("--config=")]
    if flags:
        raise InputError(f"{flags[0]} is not an option of a recipe; write --config FILE and overrides as key=value")
    merge(name, read_yaml(Path(name)), [word for word in rest if not word.startswith("-")])


def read_yaml(path: Path) -> DictConfig:
    """Return the mapping in a YAML file; refuse a file that cannot be read, is not valid YAML, or holds something else."""
    try:
        config = OmegaConf.load(path)
    except OSError as error:
        raise InputError(f"config {path} cannot be read ({error.strerror or error}); check the path") from error
    except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
        raise InputError(f"config {path} is not valid YAML ({one_line(error)})") from error
    if not isinstance(config, DictConfig) or not all(isinstance(key, str) for key in config):
        raise InputError(f"config {path} is not a mapping of keys to values; write a line `key: value` for each key")
    if "config" in config:
        raise InputError(f"config {path} has the key config, which the command line's --config would replace; remove it")
    return config


def merge(name: str, config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return a config with overrides as torchtune's command line takes them; ``name`` is for the message."""
    said = " ".join(overrides) or "its own interpolations"
    for key in (word[1:] for word in overrides if word.startswith("~")):
        node = OmegaConf.select(config, key, throw_on_resolution_failure=False, throw_on_missing=False)
        if isinstance(node, DictConfig) and COMPONENT in node:
            raise InputError(f"~{key} cannot remove a component from the command line; write {key}=null in its place")
    try:
        merged = _merge_yaml_and_cli_args(argparse.Namespace(**OmegaConf.to_container(config, resolve=False)), list(overrides))
        OmegaConf.to_container(merged, resolve=True)
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"config {name} does not take {said} ({one_line(error)})") from error
    except RecursionError as error:
        raise InputError(f"config {name} does not take {said} (an interpolation refers to itself)") from error
    return merged


# ------------------------------------------------------------------------------------------------- building


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
        for key, name, made in _functions_of(node, arguments):
            check_function(key, name, made)
        if _may_be_function(path):
            return _function(component, node[COMPONENT], arguments, args, kwargs)
        return _call(component, node[COMPONENT], args, {**arguments, **kwargs})
    if isinstance(node, Mapping):
        return {key: _build(value, f"{path}.{key}") for key, value in node.items()}
    if isinstance(node, list):
        return [_build(value, f"{path}[]") for value in node]
    return node


def _function(component: Any, name: str, arguments: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return a function of an example and turns: what the component makes, or the component itself with its arguments."""
    as_it_is = functools.partial(component, **arguments) if arguments else component
    if _is_used_as_it_is(component, arguments):
        return as_it_is
    if _hides_arguments(component):  # a decorator's wrapper: only a call tells a maker from a function of an example and turns
        try:
            made = component(*args, **arguments, **kwargs)
        except TypeError:
            return as_it_is
        return made if callable(made) else as_it_is
    return _call(component, name, args, {**arguments, **kwargs})


def _hides_arguments(component: Any) -> bool:
    """Return whether a function says that it takes any number of arguments."""
    kinds = [] if inspect.isclass(component) else [p.kind for p in inspect.signature(component).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def _call(component: Any, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        return component(*args, **kwargs)
    except InputError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"component {path} cannot be built from {', '.join(kwargs) or 'no arguments'} ({reason}, at {frame.filename} line "
            f"{frame.lineno}); check these arguments"
        ) from error


def _may_be_function(path: str) -> bool:
    """Return whether a plain function may stand under a config key."""
    parent, _, key = path.rpartition(".")
    return key in FUNCTION_KEYS or parent.rpartition(".")[2] in FUNCTIONS_KEYS


def _functions_of(node: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Return (key, dotted path, value) of each argument of ``node`` that is called with an example and turns.

    The values are those of ``arguments``. A component that is not of this package has none: it may call them in another way.
    """
    found = []
    if str(node.get(COMPONENT)).startswith("pidistill."):
        found += [(key, node.get(key), arguments.get(key)) for key in FUNCTION_KEYS]
        for key in FUNCTIONS_KEYS:
            given = node.get(key)
            if isinstance(given, Mapping) and COMPONENT not in given:
                found += [(f"{key}.{name}", part, arguments[key][name]) for name, part in given.items()]
    named = [(key, part.get(COMPONENT) if isinstance(part, Mapping) else part, value) for key, part, value in found]
    return [(key, name, value) for key, name, value in named if isinstance(name, str)]


def check_function(key: str, name: str, made: Any) -> None:
    """Refuse what a component gave for a function of an example and turns, where it cannot be called or gives no value at once.

    Args:
        key, name: the config key, and the component's dotted path, for the message.
    """
    if not callable(made):
        raise InputError(
            f"{key}: {name} gives {bounded_repr(made)}, which cannot be called with an example and the turns of its episode; "
            f"define it as def {name.rpartition('.')[2]}(example, turns)"
        )
    is_function = inspect.isroutine(made) or isinstance(made, functools.partial)
    _check_gives_value(key, name, made if is_function else type(made).__call__)


def _check_gives_value(key: str, name: str, function: Any) -> None:
    other = "a generator" if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function) else None
    other = "an async function" if inspect.iscoroutinefunction(function) else other
    if other:
        raise InputError(
            f"{key}: {name} is {other}, which gives no value when it is called; define it with `def` and `return` (in it, "
            "asyncio.run waits for what is async)"
        )


def _check_function_component(path: str, key: str, name: str) -> None:
    """Refuse a component whose instances cannot be called, or which is an async function, before it is built."""
    component = resolve(name)
    if inspect.isclass(component):
        call = next((vars(base)["__call__"] for base in component.__mro__ if "__call__" in vars(base)), None)
        if call is None and component.__new__ is object.__new__ and type(component).__call__ is type.__call__:
            raise InputError(
                f"{path}.{key}: {name} is a class whose objects cannot be called; give it a method "
                "__call__(self, example, turns)"
            )
        component = call
    _check_gives_value(f"{path}.{key}", name, component)


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


def check_config(cfg: DictConfig, known: Collection[str], required: Collection[str] = ()) -> None:
    """Refuse a key that nothing reads, naming the closest real one, and a component whose arguments are unknown or missing.

    Top-level keys outside ``known`` may only serve interpolation (``${key}``) elsewhere in the config. A reward that is null is
    taken out of ``cfg`` where its component takes none: a command line that names another component cannot remove it.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    interpolated = set(re.findall(r"\$\{([A-Za-z_]\w*)", str(raw)))
    for key in raw:
        if key not in known and key not in interpolated:
            hint = _torchtune_hint(key, known) or _component_with(key, raw) or closest(key, known)
            raise InputError(f"config key {key} is not read by this recipe{hint}")
    for key in required:
        if raw.get(key) is None:
            raise InputError(f"config key {key} is missing; this recipe needs it")
    _drop_null_functions(cfg)
    for key, node in OmegaConf.to_container(cfg, resolve=True).items():
        _check_component(key, node, raw[key])
        if not (isinstance(node, float) and math.isinf(node)):  # the table of keys says where infinity is a value
            _check_finite(key, node)


def _drop_null_functions(node: Any) -> None:
    """Take out the null of each function key (:data:`FUNCTION_KEYS`) that its component does not take, at every depth."""
    if not isinstance(node, DictConfig | ListConfig):
        return
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
            _drop_null_functions(node[key])
    if isinstance(node, ListConfig):
        return
    null = [key for key in FUNCTION_KEYS if key in node and node[key] is None]
    if null and isinstance(node.get(COMPONENT), str):
        parameters = parameters_of(resolve(node[COMPONENT]))
        for key in null:
            if key not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                del node[key]


# Keys of torchtune's own recipes, and what a recipe that trains has in their place.
_TORCHTUNE_KEYS = {
    "gradient_accumulation_steps": "micro_batch_tokens bounds the memory of a forward here, and the step does not depend on it",
    "epochs": "max_steps is the length of a run",
    "max_steps_per_epoch": "max_steps is the length of a run",
    "log_every_n_steps": "every step is logged",
    "optimizer_in_bwd": (
        "it is not available; fsdp_cpu_offload and optimizer._component_=torchao.optim.AdamW8bit need less memory too"
    ),
    "profiler": "it is not available; metrics.jsonl has the seconds of each phase in time_*_s",
    "batch_size": "one step trains on prompts_per_round × group_size rollouts, or on minibatch_rollouts of them",
}


def _torchtune_hint(key: str, known: Collection[str]) -> str | None:
    """Return the end of a sentence about a key of torchtune's recipes; None for others, and in a recipe that trains nothing."""
    return f"; {_TORCHTUNE_KEYS[key]}" if key in _TORCHTUNE_KEYS and "max_steps" in known else None


def _component_with(key: str, nodes: Mapping[str, Any]) -> str | None:
    """Return the end of a sentence about a key that belongs into a component of the config; None where none takes it."""
    for name, node in nodes.items():
        path = node.get(COMPONENT) if isinstance(node, Mapping) else None
        if isinstance(path, str) and "${" not in path and key in parameters_of(resolve(path)) and name != key:
            return f"; did you mean {name}.{key}?"
    return None


def _check_component(path: str, node: Any, raw: Any) -> None:
    """Check the components in ``node``; messages show the values of ``raw``, which may refer to a secret."""
    if isinstance(node, list):
        for i, value in enumerate(node):
            _check_component(f"{path}[{i}]", value, raw[i] if isinstance(raw, list) else raw)
    if isinstance(node, str) and _may_be_function(path) and "${" not in node:
        node = {COMPONENT: node}
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        _check_component(f"{path}.{key}", value, raw[key] if isinstance(raw, dict) else raw)
    if COMPONENT in node:
        _check_arguments(path, node, raw)


def _check_arguments(path: str, node: dict[str, Any], raw: Any) -> None:
    """Refuse a component that cannot be found, and arguments that it does not take or that it lacks."""
    if not isinstance(node[COMPONENT], str):
        raise InputError(
            f"config key {path}._component_ is {node[COMPONENT]}, not a dotted path; on the command line, write "
            f"{path}=dotted.path and {path}.argument=value"
        )
    component = resolve(node[COMPONENT])
    if not callable(component):
        raise InputError(f"config key {path}._component_={node[COMPONENT]} is not a function or a class; check the dotted path")
    try:
        parameters = inspect.signature(component).parameters
    except ValueError:  # some builtins have none
        return
    hints = hints_of(component)
    for key in parameters.keys() & node.keys():
        shown = raw[key] if isinstance(raw, dict) else raw
        _check_argument(f"{path}.{key}", node[key], shown, parameters[key], hints.get(key, Any))
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in node:
            if key != COMPONENT and key not in parameters:
                other = closest(key, parameters, none="; it takes none")
                raise InputError(f"config key {path}.{key} is not an argument of {node[COMPONENT]}{other}")
    given = {key: value for key, value in node.items() if key != COMPONENT}
    for key, name, _ in _functions_of(node, node):
        _check_function_component(path, key, name)
    if _may_be_function(path) and _is_used_as_it_is(component, given):
        return _check_function(path, node[COMPONENT], component, given)
    singular = re.sub(r"^teacher_checkpointers\..*", "teacher_checkpointer", path)
    positional, keywords = ADDED_ARGUMENTS.get(singular, (0, ()))
    for parameter in list(parameters.values())[positional:]:
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        required = parameter.default is parameter.empty and not variadic
        if required and parameter.name not in node and parameter.name not in keywords:
            raise InputError(f"config key {path}.{parameter.name} is missing; {node[COMPONENT]} needs it")


def _check_argument(path: str, value: Any, raw: Any, parameter: inspect.Parameter, hint: Any) -> None:
    """Refuse a value of another type than the component's argument has, by its annotation or else its default."""
    default = parameter.default
    if hint is Any and type(default) in (bool, int, float):
        hint = float if type(default) is int else type(default)
    named_function = (isinstance(value, str) and _may_be_function(path)) or parameter.name in FUNCTIONS_KEYS
    if value is default or named_function or accepts(hint, value, COMPONENT):
        least = 1 if _SIZE.fullmatch(parameter.name) else 0 if parameter.name.startswith(("num_", "max_")) else None
        if least is not None and type(value) is int and value < least:
            raise InputError(f"{path}={raw} must be at least {least}")
        return
    shown = "null" if raw is None else str(raw)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    colon = isinstance(value, dict) and accepts(hint, "", COMPONENT)
    quote = f"; on the command line, quote text that holds a colon: '{path}=\"...\"'" if colon else ""
    raise InputError(f"{path}={shown} must be {demanded(hint)}{quote}")


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
    parameters = parameters_of(resolve(component)) if component else {}
    return {name for name, p in parameters.items() if isinstance(p.default, float) and p.default == math.inf}
