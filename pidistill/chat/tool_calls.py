"""Read and write tool calls in the text of an assistant turn, in the form of a model family.

    hermes   <tool_call>{"name": "f", "arguments": {...}}</tool_call>, any number of them, text around (Hermes, Qwen 2.5 and 3)
    llama3   {"name": "f", "parameters": {...}} as the whole turn, behind <|python_tag|> or not (Llama 3.1 and later);
             without the tag, JSON is a call only if it has both keys
    xml      <tool_call><function=f><parameter=k>v</parameter></function></tool_call>, any number (Qwen3-Coder, Qwen 3.5); the
             tool's schema says which values are numbers: :mod:`pidistill.chat.xml_calls`
    harmony  a message with a recipient, after the reasoning (gpt-oss): :mod:`pidistill.chat.harmony`
    action   <action>{"name": "f", "arguments": {...}}</action>, for models whose chat template knows no tools
    none     the text stays as it is

Nothing in the reasoning at the beginning of a turn is a call (:mod:`pidistill.chat.reasoning`). In harmony the reasoning has a
channel of its own, and becomes ``reasoning_content``.

A turn with a malformed call has no calls: its content is the whole text, as the model wrote it, and ``tool_call_error`` says
what is wrong, for the environment to answer with. The content of a turn with calls is the text outside them.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pidistill.chat.call_json import MalformedCall, function_call, read_json
from pidistill.chat.harmony import read_harmony
from pidistill.chat.messages import ARGUMENT_KEYS, message_text, reasoning_of
from pidistill.chat.reasoning import THINK, begins_with_think, reasoning_end
from pidistill.chat.xml_calls import read_xml_call
from pidistill.types import Message, Tools

FORMATS = ("hermes", "llama3", "xml", "harmony", "action", "none")

_PYTHON_TAG = "<|python_tag|>"
_ACTION_INSTRUCTIONS = """\
You can call these tools:
{schemas}

To call one, write <action>{{"name": "...", "arguments": {{...}}}}</action>. Its result comes back within <result></result>."""


def parse_turn_text(text: str, format: str, tools: Tools = None) -> Message:
    """Return the assistant message that ``text``, a turn without its stop token, says in one of :data:`FORMATS`.

    ``tools``: the schemas of the prompt, which give the types of the arguments of XML calls.
    """
    message: Message = {"role": "assistant", "content": text}
    try:
        if format == "harmony":
            return read_harmony(text)
        head = _reasoning(text, format)
        content, calls = _split_calls(text[len(head) :], format, tools)
    except MalformedCall as error:
        return message | {"tool_call_error": str(error)}
    if calls:
        message |= {"content": head + content, "tool_calls": calls}
    return message


def visible_text(message: Message) -> str:
    """Return what a reader is meant to see of an assistant message: its content without the reasoning, stripped."""
    return answer_text(message).strip()


def answer_text(message: Message) -> str:
    """Return the content without the reasoning and the white space behind that; otherwise as it is written.

    Reasoning begins with ``<think>``, or was opened by the prompt; an answer may speak of these tags.
    """
    text = message_text(message)
    if reasoning_of(message) is not None:  # it stands in a field of its own
        return text
    end = reasoning_end(text)
    is_reasoning = begins_with_think(text) or (end > 0 and THINK not in text[:end])
    return text[end:].lstrip() if is_reasoning else text


def _reasoning(text: str, format: str) -> str:
    """Return the reasoning at the beginning of a turn; a turn of llama3 that is a call as a whole has none."""
    if format == "llama3" and text.lstrip().startswith((_PYTHON_TAG, "{")):
        return ""
    return text[: reasoning_end(text)]


def _split_calls(text: str, format: str, tools: Tools) -> tuple[str, list[dict[str, Any]]]:
    if format == "llama3":
        return _whole(text)
    if format == "xml":
        content, calls = _tagged(text, "tool_call", lambda inside: read_xml_call(inside, tools))
        return content.rstrip() if calls else content, calls  # templates write one empty line before the calls, or none
    if format in ("hermes", "action"):
        return _tagged(text, "tool_call" if format == "hermes" else "action", _arguments_call)
    return text, []


def _tagged(text: str, tag: str, read: Callable[[str], dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Return the text outside the tags, and the calls inside.

    Templates put a line break before each call, which belongs to neither the text nor the call.
    """
    pieces = re.split(rf"(</?{tag}>)", text)
    opening, closing = f"<{tag}>", f"</{tag}>"
    outside, calls, at = [pieces[0]], [], 1
    while at < len(pieces):
        if pieces[at] == closing:
            raise MalformedCall(f"{closing} without {opening} before it")
        if pieces[at + 2 : at + 3] != [closing]:
            raise MalformedCall(f"{opening} is not closed by {closing}")
        calls.append(read(pieces[at + 1]))
        outside[-1] = outside[-1].removesuffix("\n")
        outside.append(pieces[at + 3])
        at += 4
    return "".join(outside), calls


def _whole(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Read a turn that is one call; an answer may be JSON too, so without the tag it needs a call's two keys."""
    stripped = text.strip()
    if stripped.startswith(_PYTHON_TAG):
        return "", [_call(stripped.removeprefix(_PYTHON_TAG), "parameters")]
    if stripped.startswith("{") and all(re.search(key, stripped) for key in (r'"name"\s*:', r'"(parameters|arguments)"\s*:')):
        return "", [_call(stripped, "parameters")]
    return text, []


def _arguments_call(text: str) -> dict[str, Any]:
    return _call(text, "arguments")


def _call(text: str, own_key: str) -> dict[str, Any]:
    """Read a call whose arguments stand under ``own_key`` or another name that they have elsewhere.

    A model may write them under the name of another family. Names that only programs write (``args``, ``input``) are refused,
    so that no model learns to write what a server would not read.
    """
    call, form = read_json(text), f'it must be like {{"name": "...", "{own_key}": {{...}}}}'
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise MalformedCall(f"the tool call has no name; {form}")
    key = next((key for key in (own_key, *ARGUMENT_KEYS) if key in call), None)
    others = sorted(call.keys() - {"name", "id", "type"})
    if key is None and others:
        raise MalformedCall(f"the call of {call['name']} has {', '.join(others)[:80]} in place of {own_key}; {form}")
    arguments = {} if key is None else call[key]
    if not isinstance(arguments, dict):
        raise MalformedCall(f"the {key} of the call of {call['name']} must be a JSON object")
    return function_call(call["name"], arguments)


# ------------------------------------------------------------------------------------------- the action format


def as_plain_messages(messages: Sequence[Message], tools: Tools, default_system: str | None) -> list[Message]:
    """Return a conversation with tools as one without: schemas in the system message, calls and results in text.

    For the action format, whose templates have no place for tools. The results of one turn share a user message: some of these
    templates refuse two in a row, and a model that makes two calls must not end the run. ``default_system`` is the system text
    that the template gives a conversation without one, written out so that the schemas do not replace it.
    """
    plain = _plain_messages(messages)
    if not tools:
        return plain
    if not plain or plain[0]["role"] != "system":
        plain.insert(0, {"role": "system", "content": default_system or ""})
    schemas = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    texts = [message_text(plain[0]), _ACTION_INSTRUCTIONS.format(schemas=schemas)]
    return [{"role": "system", "content": "\n\n".join(filter(None, texts))}, *plain[1:]]


def _plain_messages(messages: Sequence[Message]) -> list[Message]:
    plain: list[Message] = []
    for is_result, group in itertools.groupby(messages, lambda message: message["role"] == "tool"):
        if is_result:
            results = [f"<result>\n{message_text(message)}\n</result>" for message in group]
            plain.append({"role": "user", "content": "\n".join(results)})
        else:
            plain += map(_plain_message, group)
    return plain


def _plain_message(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    lines = [message_text(message), *(f"<action>{_call_json(call)}</action>" for call in calls)]
    return {"role": message["role"], "content": "\n".join(filter(None, lines))}


def _call_json(call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    return json.dumps({"name": function["name"], "arguments": function.get("arguments", {})}, ensure_ascii=False)


# ------------------------------------------------------------------------------------------- what a template writes

PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_name",
        "description": "",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}, "required": ["probe_key"]},
    },
}
PROBE_CONVERSATION: list[Message] = [
    {"role": "user", "content": "question"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "probe0001",  # of nine letters and digits, which Mistral's templates require
                "type": "function",
                "function": {"name": "probe_name", "arguments": {"probe_key": "probe_value"}},
            }
        ],
    },
]


def written_format(turn: str) -> str | None:
    """Return the format of a rendered tool call of :data:`PROBE_CONVERSATION`; None for a form that is unknown here.

    It is "none" where the template left the call out.
    """
    if "probe_value" not in turn:
        return "none"
    for format, pattern in _WRITTEN.items():
        if re.search(pattern, turn):
            return format
    return None


_WRITTEN = {  # keys in either order: reading a call does not depend on it
    "hermes": r"<tool_call>\s*\{[^<]*probe_value[^<]*\}\s*</tool_call>",
    "action": r"<action>\s*\{[^<]*probe_value[^<]*\}\s*</action>",
    "llama3": r'"parameters": \{[^<{]*probe_value',
    "xml": r"<function=probe_name>\s*<parameter=probe_key>\s*probe_value\s*</parameter>\s*</function>",
    "harmony": r"to=(functions\.)?probe_name\b[^{]*<\|message\|>\{[^<]*probe_value",
}
