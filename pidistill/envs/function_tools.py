"""Make tools of plain typed Python functions: their schemas, and the calls of an assistant turn carried out.

    def order_status(state: Shop, order_id: str) -> str:
        \"\"\"Status of one order.

        Args:
            order_id: such as O1234.
        \"\"\"

becomes a schema with one argument. A parameter named ``state`` is not the model's: it gets the episode's state. What a model
gets wrong (an unknown tool, wrong arguments, JSON that is none) is answered with a sentence it can act on; it never ends the
run. Arguments are data: they are checked against the schema and handed over, nothing else.
"""

import inspect
import json
import logging
import pickle
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

from pidistill.components import resolve
from pidistill.data.dataset import ExampleDataset
from pidistill.envs.base import EnvStep
from pidistill.errors import InputError, attempt, bounded_repr, bounded_traceback, escape_controls
from pidistill.rewards.base import Reward, judge
from pidistill.types import Example, Message

_log = logging.getLogger(__name__)

STATE = "state"
MAX_ERROR_CHARS = 1000  # of an exception's text, which the model reads
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_VALUES = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict, "null": type(None)}


class ToolError(Exception):
    """Say that a tool refuses a call; the model is told the text."""


@dataclass(frozen=True)
class Tool:
    """Hold a function with the JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]  # JSON schema of an object with one property per argument
    function: Callable[..., Any]
    takes_state: bool  # the function's `state` parameter is filled with the episode's state

    @property
    def schema(self) -> dict[str, Any]:
        """Return the schema as chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def call(self, arguments: Any, state: Any = None) -> str:
        """Return what the tool answers: texts as they are, all else as JSON; a ToolError where arguments do not fit."""
        _check_arguments(self, arguments)
        given = {STATE: state, **arguments} if self.takes_state else arguments
        result = self.function(**given)
        if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise _no_text(self.name)
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


# ------------------------------------------------------------------------------------------- functions into schemas


def tool(function: Callable[..., Any]) -> Tool:
    """Return the function as a tool: name, docstring and annotations become the schema.

    Annotations may be str, int, float, bool, ``Literal``, ``list[...]``, ``dict[str, ...]`` and unions of these (with None).
    The docstring's text up to ``Args:`` is the description, and its ``Args:`` describe the arguments.
    """
    if not callable(function) or not hasattr(function, "__name__"):
        raise InputError(f"the tool {bounded_repr(function)} is no function with a name; write it with `def`")
    # What a decorator wraps may be async: the decorator may await it. The call itself shows what is left (Tool.call).
    if any(test(function) for test in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)):
        raise _no_text(function.__name__)
    signature = inspect.signature(function)
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        raise InputError(f"the tool {function.__name__} has an annotation that names no type: {error}") from error
    text, described = _read_docstring(inspect.getdoc(function) or "")
    properties, required = {}, []
    for name, parameter in signature.parameters.items():
        if name == STATE:
            continue
        if name not in hints or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InputError(f"the tool {function.__name__} has the parameter {name} without a type; annotate each one")
        properties[name] = _type_schema(hints[name], f"parameter {name} of the tool {function.__name__}")
        if name in described:
            properties[name]["description"] = described[name]
        if parameter.default is parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return Tool(function.__name__, text, parameters, function, STATE in signature.parameters)


def _no_text(name: str) -> InputError:
    return InputError(
        f"the tool {name} is an async function or a generator, and nothing here awaits or reads its answer; write it with "
        "`def` and `return`, and call asyncio.run in it where it must await something"
    )


def tools_by_name(functions: Iterable[Callable[..., Any] | str]) -> dict[str, Tool]:
    """Return the tools of functions, or of dotted paths to functions, by their names."""
    made = [tool(resolve(function) if isinstance(function, str) else function) for function in functions]
    names = [one.name for one in made]
    if len(set(names)) < len(names):
        raise InputError(f"two tools have one name; the functions are {', '.join(names)}")
    return dict(zip(names, made, strict=True))


def _read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """Return (description, description of each argument) of a docstring with an ``Args:`` part, as Google writes them."""
    text, _, rest = doc.partition("\nArgs:\n")
    described: dict[str, str] = {}
    lines = list(filter(str.strip, rest.splitlines()))
    name, indent = "", len(lines[0]) - len(lines[0].lstrip(" ")) if lines else 0
    for line in lines:
        deeper = len(line) - len(line.lstrip(" ")) - indent
        begins = re.match(r"\*{0,2}(\w+)(?: *\(.*?\))?: *(.*)", line.strip())  # a type in brackets may follow the name
        if indent == 0 or deeper < 0:
            break
        if deeper == 0 and begins:
            name, described[begins[1]] = begins[1], begins[2].strip()
        elif deeper > 0 and name:
            described[name] = f"{described[name]} {line.strip()}".strip()
    return " ".join(text.split()), described


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    if origin is Literal:
        kinds = {type(value) for value in arguments}
        if len(kinds) == 1 and kinds <= set(_TYPES):
            return {"type": _TYPES[kinds.pop()], "enum": list(arguments)}
    if origin is list and arguments:
        return {"type": "array", "items": _type_schema(arguments[0], where)}
    if origin is dict and arguments and arguments[0] is str:
        return {"type": "object", "additionalProperties": _type_schema(arguments[1], where)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_type_schema(argument, where) for argument in arguments]}
    raise InputError(
        f"{where} has the type {hint}, which has no schema here; use str, int, float, bool, Literal, list[...], dict[str, ...] "
        "or a union of these"
    )


# ------------------------------------------------------------------------------------------- calls


def call_tools(turn: Message, tools: Mapping[str, Tool], state: Any = None) -> list[Message]:
    """Return the messages that answer a turn: one per call, or one that says why a call cannot be read; none without calls."""
    if turn.get("tool_call_error"):
        return [_answer({}, None, f"Error: {turn['tool_call_error']}")]
    return [_carry_out(call, tools, state) for call in turn.get("tool_calls") or []]


def _carry_out(call: Mapping[str, Any], tools: Mapping[str, Tool], state: Any) -> Message:
    function = call.get("function", call)
    name, arguments = function["name"], function.get("arguments", {})
    try:
        if name not in tools:
            raise ToolError(f"there is no tool {name}; the tools are {', '.join(tools)}")
        return _answer(call, name, tools[name].call(arguments, state))
    except ToolError as error:
        return _answer(call, name, f"Error: {error}")
    except InputError:  # the function is no tool: no model can mend that
        raise
    except Exception as error:  # an error in the tool: the model may try something else, and the log shows where it is
        _warn_once(name, error)
        text, _ = attempt(partial(str, error))
        return _answer(call, name, f"Error: {type(error).__name__}" + (f": {text[:MAX_ERROR_CHARS]}" if text else ""))


def _answer(call: Mapping[str, Any], name: str | None, content: str) -> Message:
    message = {"role": "tool", "name": name, "tool_call_id": call.get("id"), "content": content}
    return {key: value for key, value in message.items() if value is not None}


_SAID: set[tuple[str, type]] = set()


def _warn_once(name: str, error: Exception) -> None:
    if (name, type(error)) not in _SAID:
        _SAID.add((name, type(error)))
        told = f"{bounded_repr(error, 300)}; models are told so (said once per tool and error)\n{bounded_traceback(error)}"
        _log.warning("the tool %s raised %s", name, escape_controls(told))


def _check_arguments(tool: Tool, arguments: Any) -> None:
    properties = tool.parameters["properties"]
    if not isinstance(arguments, Mapping):
        raise ToolError(f"the arguments of {tool.name} must be an object with {', '.join(properties) or 'no keys'}")
    missing = [name for name in tool.parameters["required"] if name not in arguments]
    unknown = [name for name in arguments if name not in properties]
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"does not know {', '.join(unknown)}"] * bool(unknown)
        raise ToolError(f"{tool.name} {' and '.join(wrong)}; its arguments are {', '.join(properties) or 'none'}")
    for name, value in arguments.items():
        if not _fits(value, properties[name]):
            wanted = {key: part for key, part in properties[name].items() if key != "description"}
            raise ToolError(f"{tool.name}: {name} is {json.dumps(value)[:80]}, but must be {json.dumps(wanted)}")


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(_fits(value, part) for part in schema["anyOf"])
    if "enum" in schema and value not in schema["enum"]:
        return False
    if schema["type"] == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, _VALUES[schema["type"]]) or (schema["type"] == "integer" and isinstance(value, bool)):
        return False
    if "items" in schema:
        return all(_fits(item, schema["items"]) for item in value)
    if "additionalProperties" in schema:
        return all(_fits(item, schema["additionalProperties"]) for item in value.values())
    return True


# ------------------------------------------------------------------------------------------- an environment of functions


def with_tools(dataset: ExampleDataset, functions: Sequence[Callable[..., Any] | str]) -> ExampleDataset:
    """Return the examples of any dataset with the schemas of the environment's functions as tools, for the template to show."""
    schemas = [one.schema for one in tools_by_name(functions).values()]
    return ExampleDataset([replace(example, tools=schemas) for example in dataset], dropped=dataset.dropped)


@dataclass
class ToolEpisode:
    """Hold one episode: the messages since the prompt, and the state that ``begin`` made for the tools."""

    example: Example
    state: Any
    turns: list[Message] = field(default_factory=list)
    done: bool = False


@dataclass(frozen=True)
class FunctionToolEnvironment:
    """Answer calls by plain functions; the first turn without a call is the answer that ``reward`` judges.

    A turn that the token limit cut is judged too, and its calls are not carried out.

    Attributes:
        functions: the tools, as functions or as dotted paths to them; the dataset shows their schemas (:func:`with_tools`).
        reward: sees the episode's messages as turns, and the state as ``example.data["state"]``; null for none, where the
            objective needs none.
        begin: the state of a new episode, a function of the example or a dotted path; null for none. It gets a copy of the
            row's data, so that a state which is part of the row belongs to one episode (what cannot be pickled is shared).
            Functions that take no ``state`` must not keep any: one environment serves many episodes, from several threads with
            `environment_threads`.
        judge_unfinished: True: an episode that `max_turns` or the token limit ends before its answer is judged as it stands;
            False: its reward is 0. Set it where a wrong answer costs something, else an agent that never answers has more than
            one that errs.
    """

    functions: Sequence[Callable[..., Any] | str]
    reward: Reward | None = None
    begin: Callable[[Example], Any] | str | None = None
    judge_unfinished: bool = False

    def __post_init__(self) -> None:
        if not self._tools:
            raise InputError("environment.functions is empty; name the functions that are the tools")
        if self.begin:
            self._begin  # noqa: B018  a path that leads nowhere is said before the first episode

    @cached_property
    def _tools(self) -> dict[str, Tool]:
        return tools_by_name(self.functions)

    @cached_property
    def _begin(self) -> Callable[[Example], Any]:
        return resolve(self.begin) if isinstance(self.begin, str) else self.begin

    def reset(self, example: Example) -> ToolEpisode:
        if not example.tools:  # without tools in the row no text of the model is read as a call
            raise InputError(
                f"{example.id} shows no tools to the model, and the environment has {', '.join(self._tools)}; set "
                "dataset._component_=pidistill.envs.function_tools.with_tools around the dataset, with the same functions"
            )
        state = self._begin(_with_own_data(example)) if self.begin else None
        if inspect.isawaitable(state):
            raise InputError(f"environment.begin={self.begin} is an async function, and nothing awaits it; write it with `def`")
        return ToolEpisode(example, state)

    def step(self, state: ToolEpisode, turn: Message, *, truncated: bool) -> EnvStep:
        if state.done:
            raise InputError(f"{state.example.id}: the episode has ended; reset first")
        state.turns.append(turn)
        answers = [] if truncated else call_tools(turn, self._tools, state.state)
        state.turns += answers
        state.done = not answers
        return EnvStep(answers, 0.0 if self.reward else None, done=False) if answers else self._verdict(state)

    def unfinished(self, state: ToolEpisode) -> EnvStep:
        """Judge an episode that a limit ended before its answer."""
        return self._verdict(state) if self.judge_unfinished else EnvStep([], 0.0, done=True)

    def _verdict(self, state: ToolEpisode) -> EnvStep:
        own = {STATE: state.state} if self.begin else {}  # without it a row's own column of that name stays
        example = replace(state.example, data={STATE: None} | state.example.data | own)
        reward, parts = judge(self.reward, example, state.turns) if self.reward else (None, {})
        return EnvStep([], reward, done=True, reward_parts=parts)


def _with_own_data(example: Example) -> Example:
    """Return the example with a copy of each column of its data; one that cannot be copied stays what it is."""
    data = {}
    for key, value in example.data.items():
        copied, error = attempt(lambda value=value: pickle.loads(pickle.dumps(value)))  # ten times as fast as a deepcopy
        data[key] = value if error else copied
    return replace(example, data=data)
