"""Run templates in a jinja2 sandbox in which they end: within a time, and with no text or list beyond a size.

Templates come with downloaded models. The sandbox of jinja2 keeps them away from Python; it does not end a template that loops
for hours, and neither a signal nor a thread would stop it everywhere. So the places where a template can repeat or multiply
something look at the clock and at sizes themselves: loops, calls, filters, operators and written text. This works in every
thread.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 10.0  # of this thread's CPU time: a busy machine does not count
MAX_SIZE = 20_000_000  # characters of a text, items of a list
MAX_NESTED = 1_000_000  # items of lists within lists that become text
MAX_BITS = 100_000  # of a whole number

_OPERATORS = frozenset(["+", "*", "**", "%"])
_TO_TEXT = frozenset(["tojson", "string", "pprint", "join", "replace", "trim", "upper", "lower", "urlencode", "escape", "e"])


class TemplateLimitError(Exception):
    """Say what a template did too long or made too large."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Limit the immutable sandbox in time and size; see the module's docstring.

    Everything that runs or compiles a template happens within :meth:`limited`.
    """

    intercepted_binops = _OPERATORS

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_check_nested, **options)
        self._clock = threading.local()
        self.globals.pop("lipsum", None)
        for table in (self.filters, self.tests):
            for name, function in list(table.items()):
                table[name] = self._limit_function(name, function)
        self.concat = self._join

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Start the time of one rendering in this thread."""
        self._clock.end = time.thread_time() + MAX_SECONDS
        try:
            yield
        finally:
            self._clock.end = None

    def add_filter(self, name: str, function: Callable) -> None:
        self.filters[name] = self._limit_function(name, function)

    # ------------------------------------------------------------------------------------------- hooks of jinja2

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Rewriter().visit(super()._parse(source, name, filename))

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        """Call for the template; ``super().call`` refuses what is unsafe."""
        self.check_time()
        self._check_arguments(getattr(function, "__name__", "call"), arguments, named)
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_text_method(owner, method.__name__, arguments)
        return self._checked(super().call(context, function, *arguments, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.check_time()
        _check_operator(operator, left, right)
        return self._checked(super().call_binop(context, operator, left, right))

    # ------------------------------------------------------------------------------------------- checks

    def check_time(self) -> None:
        end = getattr(self._clock, "end", None)
        if end is not None and time.thread_time() > end:
            raise TemplateLimitError(f"it ran for more than {MAX_SECONDS:g} seconds")

    def _checked(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | dict):
            _check_size(len(value))
        return value

    def _check_arguments(self, name: str, arguments: Iterable[Any], named: Mapping[str, Any]) -> None:
        for value in (*arguments, *named.values()):
            if isinstance(value, int) and abs(value) > MAX_SIZE:
                raise TemplateLimitError(f"it gives {name} the number {value:.3e}")

    def _limit_function(self, name: str, function: Callable) -> Callable:
        passed = bool(getattr(function, "jinja_pass_arg", None))  # jinja2 then passes a context or environment first

        @wraps(function)  # keeps jinja2's own mark of what is passed
        def limited(*arguments: Any, **named: Any) -> Any:
            self.check_time()
            given = arguments[1:] if passed else arguments
            self._check_arguments(name, given[1:], named)  # the value itself may be any number: an argument of a tool call
            if name in _TO_TEXT and given:
                _check_nested(given[0])
            if name == "replace" and len(given) > 2:
                _check_text_method(str(given[0]), "replace", given[1:])
            if name in ("join", "list") and given:
                separator = len(str(given[1])) if name == "join" and len(given) > 1 else 0
                collected = self._collect(given[0], separator)
                arguments = (*arguments[: len(arguments) - len(given)], collected, *given[1:])
            return self._checked(function(*arguments, **named))

        return limited

    def _collect(self, items: Iterable[Any], separator: int) -> list[Any]:
        """Return the items as a list, as long as they and their separators are small enough to stand side by side."""
        made, size = [], 0
        for item in items:
            self.check_time()
            size += separator + (len(item) if isinstance(item, str) else 1)
            _check_size(size)
            made.append(item)
        return made

    def _join(self, pieces: Iterable[str]) -> str:
        """Join what a template, a macro or a block writes, as it is written."""
        made, size = [], 0
        for piece in pieces:
            self.check_time()
            size += len(piece)
            _check_size(size)
            made.append(piece)
        return "".join(made)

    # ------------------------------------------------------------------------------------------- what _Rewriter puts in

    def limit_loop(self, items: Any) -> "_Loop":
        return _Loop(self, items)

    def limit_text(self, *pieces: Any) -> str:
        return self._join(str(_check_nested(piece)) for piece in pieces)


class _Loop:
    """Yield the items of a loop, and look at the clock before each."""

    def __init__(self, environment: LimitedEnvironment, items: Any) -> None:
        self._environment, self._items = environment, items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._environment.check_time()
            yield item


class _Rewriter(NodeTransformer):
    """Put the limits around loops and joined texts (``~``), for which jinja2 has no hook."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        node = self.generic_visit(node)
        node.iter = _call("limit_loop", [node.iter], node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = self.generic_visit(node)
        return _call("limit_text", node.nodes, node)


def _call(name: str, arguments: list[nodes.Expr], node: nodes.Node) -> nodes.Node:
    function = nodes.EnvironmentAttribute(name)
    return nodes.Call(function, arguments, [], None, None).set_lineno(node.lineno)


def _check_size(size: float) -> None:
    if size > MAX_SIZE:
        raise TemplateLimitError(f"it makes a text or list of {size:.3e} characters or items, more than {MAX_SIZE:,}")


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateLimitError(f"it computes a number of {bits:.3e} bits, more than {MAX_BITS:,}")


def _check_nested(value: Any) -> Any:
    """Return the value; refuse lists within lists that would be too large as text, because one list may stand in many."""
    if not isinstance(value, Mapping | list | tuple):
        return value
    left, seen, characters = [value], 0, 0
    while left:
        item = left.pop()
        if isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        elif isinstance(item, str):
            characters += len(item)
            _check_size(characters)
        seen += 1
        if seen + len(left) > MAX_NESTED:
            raise TemplateLimitError(f"it writes lists within lists of more than {MAX_NESTED:,} items")
    return value


def _check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large, before it is computed."""
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(max(1, abs(left).bit_length()) * abs(right))
    elif operator == "*":
        numbers = [value for value in (left, right) if isinstance(value, int)]
        sequences = [value for value in (left, right) if isinstance(value, str | list | tuple | bytes)]
        for value in sequences:
            _check_size(len(value) * max(map(abs, numbers), default=1))
        if len(numbers) == 2:
            _check_bits(sum(value.bit_length() for value in numbers))
    elif operator == "%" and isinstance(left, str):
        _check_nested(right)
        _check_widths(left)
        _check_size(left.count("%") * _longest(right.values() if isinstance(right, Mapping) else [right]))
    elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check_size(len(left) + len(right))


def _check_text_method(text: str, method: str, arguments: tuple[Any, ...]) -> None:
    """Refuse a call of a text's method that multiplies texts beyond the limit."""
    if method == "replace" and len(arguments) > 1 and all(isinstance(value, str) for value in arguments[:2]):
        _check_size(len(text) + text.count(arguments[0]) * len(arguments[1]))
    elif method == "join" and arguments and isinstance(arguments[0], list | tuple):
        _check_size(sum(len(item) + len(text) for item in arguments[0] if isinstance(item, str)))
    elif method in ("format", "format_map", "expandtabs"):
        _check_widths(text)
        _check_size(text.count("{") * _longest(arguments))
        if method == "expandtabs":
            _check_size(text.count("\t") * max([8, *(value for value in arguments if isinstance(value, int))]))


def _longest(values: Iterable[Any]) -> int:
    return max((len(value) for value in values if isinstance(value, str)), default=0)


def _check_widths(format: str) -> None:
    """Refuse a format with numbers so large that they would be widths beyond the limit."""
    _check_size(sum(int(number[:12]) for number in re.findall(r"[0-9]{4,}", format)))
