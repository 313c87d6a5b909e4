"""Choose the checker of types under pytest: jaxtyping where an annotation has shapes, plain beartype elsewhere.

jaxtyping's import hook decorates every function of the package with `jaxtyping.jaxtyped`, which binds the arguments of a call
and checks them twice: half the time of a small run. Only annotations with shapes need it. Like Python's own type rules, the
checker takes an int where a float is annotated.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
_check_shapes = jaxtyping.jaxtyped


def has_shapes(annotation: Any) -> bool:
    """Return whether an annotation, or a part of it, is one of jaxtyping's; text that is not evaluated yet may be one."""
    if isinstance(annotation, str | typing.ForwardRef):
        return True
    if isinstance(annotation, list | tuple):  # the arguments of a Callable
        return any(map(has_shapes, annotation))
    own = inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray)
    return own or any(map(has_shapes, typing.get_args(annotation)))


def check_calls(function: Any = None, *, typechecker: Callable) -> Any:
    """Decorate a function, or the ``__init__`` of a dataclass, as `jaxtyping.jaxtyped` does."""
    if function is None:
        return functools.partial(check_calls, typechecker=typechecker)
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = check_calls(function.__init__, typechecker=typechecker)
        return function
    if not inspect.isfunction(function) or any(map(has_shapes, function.__annotations__.values())):
        return _check_shapes(function, typechecker=typechecker)
    return checker(function)


jaxtyping.jaxtyped = check_calls
