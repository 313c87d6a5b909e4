"""Compare a value of a config with the annotation of the argument that takes it."""

import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text", type(None): "null"}
_UNIONS = (typing.Union, types.UnionType)


def accepts(hint: Any, value: Any, component: str) -> bool:
    """Return whether a value of plain YAML can be what ``hint`` asks for.

    A mapping with the key ``component`` becomes an object of a type that is not known here, so every hint but the plain ones
    accepts it, and a class of another library also accepts text and mappings, which some functions translate (`bf16`, `cuda`).
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return any(accepts(part, value, component) for part in inner)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if hint in _NAMES:
        return _is_plain(hint, value)
    if isinstance(value, dict) and component in value:
        return True
    kind = origin or hint
    if not isinstance(kind, type) or kind in (object, Any):
        return True
    if issubclass(kind, Mapping):
        return isinstance(value, dict)
    if issubclass(kind, list | tuple | set | frozenset) or (kind.__module__ == "collections.abc" and hasattr(kind, "__iter__")):
        item = inner[0] if inner else Any
        return isinstance(value, list) and all(accepts(item, part, component) for part in value)
    ours = issubclass(kind, torch.Tensor) or kind.__module__.startswith("pidistill.")
    return isinstance(value, str | dict) and not ours


def _is_plain(hint: Any, value: Any) -> bool:
    if hint is float:
        return type(value) in (int, float)
    return isinstance(value, str) if hint is Path else type(value) is hint


def demanded(hint: Any) -> str:
    """Return what a value must be, as a message says it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return " or ".join(dict.fromkeys(demanded(part) for part in inner if part is not torch.Tensor))
    if origin is Literal:
        return " or ".join(map(str, inner))
    if hint in _NAMES:
        return _NAMES[hint]
    kind = origin or hint
    if kind is Callable:
        return "a component or the dotted path of a function"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping"
    if isinstance(kind, type) and (issubclass(kind, list | tuple | set | frozenset) or kind.__module__ == "collections.abc"):
        return f"a list of {demanded(inner[0]).removeprefix('a ')}s" if inner and inner[0] in (int, float) else "a list"
    return f"a component ({getattr(kind, '__name__', kind)})"
