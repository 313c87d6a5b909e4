"""Find tool calls in agent conversations, however they are written: OpenAI's ``tool_calls``, or between tags in the text.

{"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": "{\\"day\\": 20}"}}]}
{"role": "assistant", "content": "Looking. <action>{\\"name\\": \\"find\\", \\"arguments\\": {\\"day\\": 20}}</action>"}

Between the tags a call is JSON, the same as Python writes it, or XML: :mod:`pidistill.chat.xml_calls`. XML is a call without
its ``<tool_call>`` tags too (OpenHands), where ``tool_call`` is among the tags that are read.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pidistill.chat.call_json import MalformedCall
from pidistill.chat.messages import RECORDED_ARGUMENT_KEYS, message_text, parsed_arguments, unknown_arguments_key
from pidistill.chat.reasoning import CALL_TAGS, reasoning_end
from pidistill.chat.templates import check_template
from pidistill.chat.xml_calls import read_xml_call
from pidistill.types import Message, Tools

ACTION_TAGS = CALL_TAGS
XML_TAG = "tool_call"  # around XML calls
_BARE_XML = r"<function=[^<>\s]+>\s*(?:<parameter=[^<>\n]+>(?:(?!</parameter>|<function=).)*</parameter>\s*)*</function>"

CALL_TEMPLATE = "{number}. {name}({arguments})"


@dataclass(frozen=True)
class ToolCall:
    """Hold the name and the arguments of one call: an object, or the text that a model wrote instead of one."""

    name: str
    arguments: Any


@dataclass(frozen=True)
class CallStyle:
    """Say how calls are found and written as text; one line per call, in their order.

    Attributes:
        template: one line: ``{number}`` (from 1), ``{name}``, ``{arguments}`` (JSON); any of them may be left out.
        omit_tools: calls of these tools are not written (τ-bench's `think` is reasoning, not an action).
        action_tags: between which tags an assistant's text holds calls; only looked at where a message has no ``tool_calls``.
    """

    template: str = CALL_TEMPLATE
    omit_tools: Sequence[str] = ()
    action_tags: Sequence[str] = ACTION_TAGS

    def __post_init__(self) -> None:
        check_template(self.template, "call_template", (), ("number", "name", "arguments"))

    def calls(self, turns: Sequence[Message], tools: Tools = None) -> list[ToolCall]:
        """Return the calls of all assistant turns, in order, without those of ``omit_tools``; ``tools`` as in `calls_of`."""
        found = [call for turn in turns if turn["role"] == "assistant" for call in calls_of(turn, self.action_tags, tools)]
        return [call for call in found if call.name not in self.omit_tools]

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(self._line(number, call) for number, call in enumerate(calls, start=1))

    def _line(self, number: int, call: ToolCall) -> str:
        arguments = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)
        return self.template.format(number=number, name=call.name, arguments=arguments)


def calls_of(message: Message, action_tags: Sequence[str] = ACTION_TAGS, tools: Tools = None) -> list[ToolCall]:
    """Return the readable calls of one assistant message, in order; ``tools`` give the types of the arguments of XML calls."""
    return [call for call in calls_and_unreadable(message, action_tags, tools) if isinstance(call, ToolCall)]


def unreadable_calls(message: Message, action_tags: Sequence[str] = ACTION_TAGS) -> int:
    """Return how many tags of the text hold something that is no call."""
    return sum(isinstance(call, str) for call in calls_and_unreadable(message, action_tags))


def calls_and_unreadable(
    message: Message, action_tags: Sequence[str] = ACTION_TAGS, tools: Tools = None
) -> list[ToolCall | str]:
    """Return the calls of one assistant message, in order, with the text of each that cannot be read in its place."""
    if message.get("tool_calls"):
        return [as_call(call) or str(call) for call in message["tool_calls"]]
    text = message_text(message)
    said = text[reasoning_end(text, action_tags) :]  # nothing in the reasoning is a call
    found = _tagged(tuple(action_tags)).finditer(said)
    return [_read(match["inside"] or match["unclosed"] or match["bare"] or "", tools) for match in found]


def has_malformed_call(message: Message, action_tags: Sequence[str] = ACTION_TAGS) -> bool:
    """Return whether a message calls a tool with arguments that are not a JSON object."""
    return any(not isinstance(call.arguments, Mapping) for call in calls_of(message, action_tags))


def as_call(value: Any) -> ToolCall | None:
    """Return the call that a recorded ``{"name", "arguments"}`` says, maybe under ``"function"``; None where it says none.

    The arguments may stand under each of :data:`~pidistill.chat.messages.RECORDED_ARGUMENT_KEYS`. An object that stands under
    another key is not read as a call without arguments.
    """
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or unknown_arguments_key(value):
        return None
    given = next((function[key] for key in RECORDED_ARGUMENT_KEYS if function.get(key) is not None), {})
    return ToolCall(function["name"], parsed_arguments(given))


@lru_cache
def _tagged(tags: tuple[str, ...]) -> re.Pattern[str]:
    names = "|".join(map(re.escape, tags)) or r"(?!)"
    unclosed = rf"<(?:{names})>\s*(?P<unclosed>(?:\{{|<function=).*)"  # a call that lacks its closing tag
    bare = rf"(?P<bare>{_BARE_XML if XML_TAG in tags else '(?!)'})"
    return re.compile(rf"<(?P<tag>{names})>(?P<inside>.*?)</(?P=tag)>|{unclosed}|{bare}", re.DOTALL)


def _read(inside: str, tools: Tools) -> ToolCall | str:
    text = inside.strip()
    try:
        value = read_xml_call(text, tools) if text.startswith("<function=") else _json_or_literal(text)
    except (MalformedCall, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return as_call(value) or text


def _json_or_literal(text: str) -> Any:
    """Return what JSON says, or an object as Python writes it; the errors are those of both readers."""
    try:
        return json.loads(text)
    except ValueError:
        if not text.startswith("{"):
            raise
        return json.loads(json.dumps(ast.literal_eval(text), allow_nan=False))
