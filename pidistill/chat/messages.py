"""The chat format: what a list of messages must look like, and the text of a message."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pidistill.errors import InputError
from pidistill.types import Message

ROLES = ("system", "user", "assistant", "tool")


def message_text(message: Message) -> str:
    """The content as text: a string, the text parts of a list joined, or "" where there is none (a bare tool call)."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def with_text(message: Message, text: str) -> Message:
    """The message with ``text`` added at the end of its content, after an empty line where it has any."""
    text = f"\n\n{text}" if message_text(message) else text
    if isinstance(message.get("content"), list):
        return {**message, "content": [*message["content"], {"type": "text", "text": text}]}
    return {**message, "content": message_text(message) + text}


def tool_call_text(call: Mapping[str, Any]) -> str:
    """One tool call as ``name({"argument": "value"})``."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    return f"{function['name']}({arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)})"


def messages_text(messages: Sequence[Message]) -> str:
    """Contents and tool calls of the messages, without roles, an empty line between messages."""
    texts = ["\n".join([*filter(None, [message_text(m)]), *map(tool_call_text, m.get("tool_calls") or [])]) for m in messages]
    return "\n\n".join(text for text in texts if text)


def transcript_text(turns: Sequence[Message]) -> str:
    """Who said what, a message after the other: text, then tool calls, one a line; results with their tool's name."""
    return "\n".join(map(_spoken, turns))


def _spoken(turn: Message) -> str:
    who = f"{turn['role']} {turn['name']}" if turn["role"] == "tool" and turn.get("name") else turn["role"]
    said = [*filter(None, [message_text(turn)]), *map(tool_call_text, turn.get("tool_calls") or [])]
    return f"{who}: " + "\n".join(said)


def last_user_index(messages: Sequence[Message]) -> int | None:
    return next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "user"), None)


def check_messages(value: Any, where: str, key: str) -> list[Message]:
    """``value`` as a list of messages, or an error that names the row (``where``), the message and the field.

    Fields that are null are removed, and tool arguments written as JSON text become objects: Arrow files hold a null for
    every field that some other row has, and chat templates write both out as if they were meant.
    """
    if not isinstance(value, list) or not value:
        found = "empty" if isinstance(value, list) else f"a {type(value).__name__}"
        raise InputError(f"{where}: {key} is {found}, not a list of messages like {{'role': 'user', 'content': '...'}}")
    return [_check_message(message, f"{where}: {key}[{i}]") for i, message in enumerate(value)]


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is a {type(message).__name__}, not a message like {{'role': 'user', 'content': '...'}}")
    message = without_nulls(message)
    if "role" not in message:
        raise InputError(f"{where} has no 'role' (it has: {', '.join(message) or 'nothing'})")
    if message["role"] not in ROLES:
        raise InputError(f"{where} has the unknown role {message['role']!r}; known roles are {', '.join(ROLES)}")
    _check_content(message, where)
    if "tool_calls" in message:
        message["tool_calls"] = [_check_tool_call(call, where) for call in message["tool_calls"]]
    return message


def _check_content(message: Message, where: str) -> None:
    content = message.get("content")
    if content is None:
        if message["role"] != "assistant" or not message.get("tool_calls"):
            raise InputError(f"{where} has no 'content'; only an assistant message with 'tool_calls' may lack it")
    elif isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise InputError(f"{where} has a content part that is not text; only text is supported")
    elif not isinstance(content, str):
        raise InputError(f"{where} has a 'content' of type {type(content).__name__}; it must be text")


def _check_tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} has a tool call without a function name: {call!r}")
    function = {**function, "arguments": parsed_arguments(function.get("arguments", {}))}
    return {**call, "function": function} if "function" in call else function


def parsed_arguments(arguments: Any) -> Any:
    """A tool call's arguments as an object where they are JSON text of one; else as they are."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except json.JSONDecodeError:  # what a model wrote need not be JSON; the template gets the text as it is
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def without_nulls(value: Any) -> Any:
    """Plain dicts and lists without the keys whose value is None, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value
