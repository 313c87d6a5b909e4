"""Find tool calls in agent conversations, however they are written: OpenAI's ``tool_calls``, or JSON between tags in the text.

{"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": "{\\"day\\": 20}"}}]}
{"role": "assistant", "content": "Looking. <action>{\\"name\\": \\"find\\", \\"arguments\\": {\\"day\\": 20}}</action>"}
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pidistill.chat.messages import ARGUMENT_KEYS, message_text, parsed_arguments
from pidistill.chat.templates import check_template
from pidistill.types import Message

ACTION_TAGS = ("action", "tool_call")

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
        action_tags: between which tags an assistant's text holds calls as JSON; only looked at where a message has no
            ``tool_calls``.
    """

    template: str = CALL_TEMPLATE
    omit_tools: Sequence[str] = ()
    action_tags: Sequence[str] = ACTION_TAGS

    def __post_init__(self) -> None:
        check_template(self.template, "call_template", (), ("number", "name", "arguments"))

    def calls(self, turns: Sequence[Message]) -> list[ToolCall]:
        """Return the calls of all assistant turns, in order, without those of ``omit_tools``."""
        found = [call for turn in turns if turn["role"] == "assistant" for call in calls_of(turn, self.action_tags)]
        return [call for call in found if call.name not in self.omit_tools]

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(self._line(number, call) for number, call in enumerate(calls, start=1))

    def _line(self, number: int, call: ToolCall) -> str:
        arguments = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)
        return self.template.format(number=number, name=call.name, arguments=arguments)


def calls_of(message: Message, action_tags: Sequence[str] = ACTION_TAGS) -> list[ToolCall]:
    """Return the readable calls of one assistant message, in order."""
    return [call for call in _found(message, action_tags) if call is not None]


def unreadable_calls(message: Message, action_tags: Sequence[str] = ACTION_TAGS) -> int:
    """Return how many tags of the text hold something that is no call as JSON."""
    return sum(call is None for call in _found(message, action_tags))


def has_malformed_call(message: Message, action_tags: Sequence[str] = ACTION_TAGS) -> bool:
    """Return whether a message calls a tool with arguments that are not a JSON object."""
    return any(not isinstance(call.arguments, Mapping) for call in calls_of(message, action_tags))


def as_call(value: Any) -> ToolCall | None:
    """Return the call that ``{"name", "arguments" | "kwargs" | "parameters"}``, maybe under ``"function"``, says, or None."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    given = next((function[key] for key in ARGUMENT_KEYS if function.get(key) is not None), {})
    return ToolCall(function["name"], parsed_arguments(given))


def _found(message: Message, action_tags: Sequence[str]) -> list[ToolCall | None]:
    if message.get("tool_calls"):
        return [as_call(call) for call in message["tool_calls"]]
    return [as_call(_json(inside)) for _, inside in _tagged(tuple(action_tags)).findall(_said(message))]


def _said(message: Message) -> str:
    """Return the text behind the reasoning, in which nothing is a call."""
    text = message_text(message)
    _, closed, said = text.partition("</think>")
    is_open = text.lstrip().startswith("<think>")  # elsewhere the tag may be a word of an argument
    return said if closed or is_open else text


@lru_cache
def _tagged(tags: tuple[str, ...]) -> re.Pattern[str]:
    names = "|".join(map(re.escape, tags)) or r"(?!)"
    return re.compile(rf"<({names})>(.*?)</\1>", re.DOTALL)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # of an endless number json raises a plain ValueError
        return None
