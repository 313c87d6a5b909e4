"""Check chat messages, and write them as text.

Rows write conversations in several ways. :func:`check_messages` reads the ones that have one meaning only, and returns the one
form that the rest of the package knows:

    stored as                                        becomes
    JSON text of a list of messages                  the list
    {"from": "human", "value": "..."} (ShareGPT)     {"role": "user", "content": "..."}
    the roles developer, function                    system, tool
    function_call (OpenAI's older form)              tool_calls with one call
    arguments as JSON text; "" or null               an object; {}
    tool_calls: []                                   no tool_calls
    kwargs, parameters, args, input of a call        arguments
    weight, train, loss_weight: 0 or false           weight: 0 (the turn is shown and not learned)
    results of parallel calls in any order           in the order of the calls, by tool_call_id
    a result that is one <tool_response> as a whole  what stands inside: templates write the tags themselves
    reasoning as text parts, reasoning_details,      one text
    thinking_blocks
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pidistill.errors import InputError, bounded_repr
from pidistill.types import Message

ROLES = ("system", "user", "assistant", "tool")
ARGUMENT_KEYS = ("arguments", "kwargs", "parameters")  # OpenAI and Qwen; τ-bench's reference actions; Llama 3
RECORDED_ARGUMENT_KEYS = (*ARGUMENT_KEYS, "args", "input")  # LangChain; Anthropic. In sampled text no server reads them
_BESIDE_A_CALL = (  # objects that are no arguments
    "extra_content", "provider_specific_fields", "metadata", "cache_control", "result", "output", "response", "usage", "error",
)  # fmt: skip
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
REASONING_PARTS = ("reasoning_details", "thinking_blocks")  # of OpenRouter and LiteLLM: lists of parts
_TEXT_TYPES = (None, "text", "input_text", "output_text")
_OTHER_CONTENT = (
    "image", "images", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "input_video",
    "file", "file_data", "input_file", "refusal", "thought", *REASONING_KEYS, "tool_calls", "function_call",
)  # fmt: skip


def message_text(message: Message) -> str:
    """Return the content as text: a string, the text parts of a list joined, or "" where there is none (a bare tool call)."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def reasoning_of(message: Message) -> str | None:
    """Return the reasoning that stands in a field of its own; None where there is none."""
    return next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), None)


def with_text(message: Message, text: str) -> Message:
    """Return the message with ``text`` added at the end of its content, after an empty line where it has any."""
    text = f"\n\n{text}" if message_text(message) else text
    if isinstance(message.get("content"), list):
        return {**message, "content": [*message["content"], {"type": "text", "text": text}]}
    return {**message, "content": message_text(message) + text}


def tool_call_text(call: Mapping[str, Any]) -> str:
    """Return one tool call as ``name({"argument": "value"})``."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    return f"{function['name']}({arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)})"


def messages_text(messages: Sequence[Message]) -> str:
    """Return contents and tool calls of the messages, without roles, with an empty line between messages."""
    texts = ["\n".join([*filter(None, [message_text(m)]), *map(tool_call_text, m.get("tool_calls") or [])]) for m in messages]
    return "\n\n".join(text for text in texts if text)


def privileged_text(given: str | Sequence[Message] | None) -> str:
    """Return privileged information as text; of messages also the reasoning that stands in a field of its own."""
    if isinstance(given, str):
        return given
    return "\n\n".join(filter(None, (text for m in given or [] for text in (reasoning_of(m), messages_text([m])))))


def transcript_text(turns: Sequence[Message]) -> str:
    """Return who said what, message by message: text, then tool calls, one a line; results with their tool's name."""
    return "\n".join(map(_spoken, turns))


def _spoken(turn: Message) -> str:
    who = f"{turn['role']} {turn['name']}" if turn["role"] == "tool" and turn.get("name") else turn["role"]
    said = [*filter(None, [message_text(turn)]), *map(tool_call_text, turn.get("tool_calls") or [])]
    return f"{who}: " + "\n".join(said)


def last_user_index(messages: Sequence[Message]) -> int | None:
    """Return the position of the last user message, or None where there is none."""
    return next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "user"), None)


_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
_OTHER_ROLES = {"developer": "system", "function": "tool"}
_WEIGHT_KEYS = ("weight", "train", "loss_weight")
_LIKE_A_WEIGHT = re.compile(r"(^|_)(weights?|train(ing|able|ed)?|loss|masks?|masked|learn(ed|able)?)(_|$)")


def messages_from_text(text: str) -> list[Any] | None:
    """Return the messages that ``text`` holds as JSON; None where it is ordinary text.

    Every object of the list names a speaker, and one at least also says something: a list of flights ``from`` one city ``to``
    another is ordinary text.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    has_speakers = isinstance(value, list) and all(isinstance(m, dict) and {"role", "from"} & set(m) for m in value)
    return value if has_speakers and any(map(_says_something, value)) else None


def _says_something(message: Message) -> bool:
    keys = message.keys()
    return {"from", "value"} <= keys or ("role" in keys and not keys.isdisjoint(("content", "tool_calls", "function_call")))


def check_messages(value: Any, where: str, key: str) -> list[Message]:
    """Return ``value`` as a list of messages in the form that the module's table says.

    Fields that are null are removed from messages and calls, because tables hold a null for every field that another row has,
    and chat templates write such nulls out as words. Nulls among the arguments of a call are kept. Errors name the row
    (``where``), the message and the field.
    """
    if isinstance(value, str):
        value = messages_from_text(value) or value
    if not isinstance(value, list) or not value:
        found = "empty" if isinstance(value, list) else f"a {type(value).__name__}"
        raise InputError(f"{where}: {key} is {found}, not a list of messages like {{'role': 'user', 'content': '...'}}")
    where = f"{where}: {key}"
    return _order_results([_check_message(message, f"{where}[{i}]") for i, message in enumerate(value)])


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is a {type(message).__name__}, not a message like {{'role': 'user', 'content': '...'}}")
    message = _without_null_fields(message)
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, where)
    if "role" not in message:
        raise InputError(
            f"{where} has no 'role' (it has: {', '.join(message) or 'nothing'}); give it one of {', '.join(ROLES)}"
        )
    role = message["role"]
    if not isinstance(role, str) or _OTHER_ROLES.get(role, role) not in ROLES:
        raise InputError(f"{where} has the unknown role {bounded_repr(role)}; known roles are {', '.join(ROLES)}")
    message["role"] = _OTHER_ROLES.get(role, role)
    _read_function_call(message, where)
    _check_content(message, where)
    if "tool_calls" in message:
        message["tool_calls"] = _check_tool_calls(message["tool_calls"], where)
        if not message["tool_calls"]:
            del message["tool_calls"]  # some templates take an empty list for a call
    if message["role"] == "assistant":
        _read_reasoning(message, where)
    if message["role"] == "tool" and isinstance(message["content"], str):
        message["content"] = _without_response_tags(message["content"])
    _read_weight(message, where)
    return message


def _from_sharegpt(message: Message, where: str) -> Message:
    """Return a message of ``from`` and ``value`` with ``role`` and ``content``."""
    speaker = message.pop("from")
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        raise InputError(f"{where} is from {bounded_repr(speaker)}, which is unknown; write one of {known}")
    message = {"role": _SHAREGPT_ROLES[speaker], **message}
    if "value" in message:
        message["function_call" if speaker == "function_call" else "content"] = message.pop("value")
    return message


def _read_function_call(message: Message, where: str) -> None:
    """Turn OpenAI's older ``function_call`` into ``tool_calls``."""
    call = message.pop("function_call", None)
    if call is None:
        return
    if isinstance(call, str):
        call = parsed_arguments(call)
    calls = _check_tool_calls([call], where)
    if message.get("tool_calls"):
        raise InputError(f"{where} has both 'function_call' and 'tool_calls'; keep the one that is meant")
    message["tool_calls"] = [{"type": "function", "function": calls[0].get("function", calls[0])}]


def _check_content(message: Message, where: str) -> None:
    content = message.get("content")
    if content is None:
        if message["role"] != "assistant" or not message.get("tool_calls"):
            raise InputError(
                f"{where} has no 'content', which only an assistant message with 'tool_calls' may lack; write \"\" where it is "
                "empty, or leave the row out"
            )
    elif isinstance(content, list):
        other = [part for part in content if not _is_text(part)]
        if other:
            raise InputError(
                f"{where} has a content part that is not text ({bounded_repr(other[0])}); write reasoning as "
                "'reasoning_content', tool calls as 'tool_calls' and results as messages of the role tool, or leave the row out"
            )
        message["content"] = [_without_null_fields(part) for part in content]
    elif not isinstance(content, str):
        raise InputError(f"{where} has a 'content' of type {type(content).__name__}; it must be text")


_RESPONSE = re.compile(r"\s*<tool_response>\n?((?:(?!</?tool_response>).)*?)\n?</tool_response>\s*", re.DOTALL)


def _without_response_tags(text: str) -> str:
    """Return what one pair of Hermes' result tags encloses; a text that has more or less than one pair stays as it is."""
    response = _RESPONSE.fullmatch(text)
    return text if response is None else response[1]


def _is_text(part: Any) -> bool:
    """Return whether a content part is text alone; what is said about the text, such as annotations, may stand beside it."""
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str) or part.get("type") not in _TEXT_TYPES:
        return False
    return not any(without_nulls(part.get(key)) for key in _OTHER_CONTENT)


def _read_reasoning(message: Message, where: str) -> None:
    """Turn reasoning that is stored as parts into one text; refuse what holds no text that could be read."""
    for key in (*REASONING_KEYS, *REASONING_PARTS):
        value = message.get(key)
        if key not in message or (key in REASONING_KEYS and isinstance(value, str)):
            continue
        del message[key]
        text = _joined_reasoning(value, "\n\n" if key == "thinking_blocks" else "")
        if text is None and reasoning_of(message) is None:
            raise InputError(
                f"{where} has a {key!r} that is not text ({bounded_repr(value)}); write the reasoning as text into "
                "'reasoning_content', or remove the key"
            )
        if text and reasoning_of(message) is None:
            message["reasoning_content"] = text


def _joined_reasoning(value: Any, joint: str) -> str | None:
    """Return the text of reasoning that is a list of parts, or one part; None where a part has no text."""
    texts = [_reasoning_part(part) for part in (value if isinstance(value, list) else [value] if value else [])]
    return None if None in texts else joint.join(texts)


def _reasoning_part(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    keys = ("text", "thinking", "content", "summary")
    return next((part[key] for key in keys if isinstance(part.get(key), str)), None) if isinstance(part, Mapping) else None


def _check_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str):  # a table, whose columns have one type, holds calls as JSON text
        try:
            calls = json.loads(calls or "[]")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} has 'tool_calls' that are text but not JSON ({error}); give a list of calls") from error
    if not isinstance(calls, list):
        raise InputError(f"{where} has 'tool_calls' of type {type(calls).__name__}; give a list of calls")
    return [_check_tool_call(call, where) for call in calls]


def _check_tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(
            f"{where} has a tool call without a function name ({bounded_repr(call)}); give it a name, or leave the row out"
        )
    function, other = _without_null_fields(function), unknown_arguments_key(call)
    if other is not None:
        raise InputError(
            f"{where} has a call of {function['name']} whose arguments seem to stand under {other!r}, which is not read; write "
            f"them beside the name as 'arguments' ({', '.join(RECORDED_ARGUMENT_KEYS[1:])} are read there too), or remove the "
            "key"
        )
    given = next((function.pop(key) for key in RECORDED_ARGUMENT_KEYS if key in function), None)
    function["arguments"] = parsed_arguments(given)
    return {**_without_null_fields(call), "function": function} if "function" in call else function


def unknown_arguments_key(call: Mapping[str, Any]) -> str | None:
    """Return the key of a recorded call, or of its function, that holds an object although it is no key of arguments.

    None where the call has arguments under a key that is read, or holds no other object, as a call without arguments does.
    """
    function = call.get("function", call)
    if any(function.get(key) is not None for key in RECORDED_ARGUMENT_KEYS):
        return None
    found = [*function.items(), *call.items()] if function is not call else [*function.items()]
    others = (key for key, value in found if key not in ("function", *_BESIDE_A_CALL) and _holds_object(value))
    return next(others, None)


def _holds_object(value: Any) -> bool:
    value = parsed_arguments(value)
    return isinstance(value, Mapping) and bool(without_nulls(value))


def _order_results(messages: list[Message]) -> list[Message]:
    """Return the messages with the results of parallel calls in the order of the calls: many templates show no ids.

    Results stay as they are where the id of one is none of the calls directly before, or where two of these calls share an id.
    """
    ordered: list[Message] = []
    calls: list[str] = []  # ids of the calls directly before
    for role, group in itertools.groupby(messages, key=lambda message: message["role"]):
        same = list(group)
        results = {str(message.get("tool_call_id", "")) for message in same}
        if role == "tool" and results <= set(calls) - {""} and len(set(calls)) == len(calls):
            same.sort(key=lambda message: calls.index(str(message["tool_call_id"])))
        calls = [str(call.get("id", "")) for message in same for call in message.get("tool_calls") or []]
        ordered += same
    return ordered


def _read_weight(message: Message, where: str) -> None:
    """Leave ``weight: 0`` in an assistant message that is not to be learned, and no other key of this kind."""
    given = {key: message.pop(key) for key in [*message] if _says_what_is_learned(message, key)}
    for key, value in given.items():
        if key not in _WEIGHT_KEYS:
            known = ", ".join(_WEIGHT_KEYS)
            raise InputError(
                f"{where} has the key {key!r}, which seems to say what is learned and is not read; write {known} "
                "(0: the turn is not learned), or remove it"
            )
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise InputError(f"{where}: {key} is {value!r}; write 1 for a turn that is learned, or 0 for one that is not")
        if value and message["role"] != "assistant":
            raise InputError(
                f"{where}: {key} is {value!r} on a {message['role']} message; only assistant messages are learned: set it to 0 "
                "or remove it"
            )
    if len({bool(value) for value in given.values()}) > 1:
        raise InputError(f"{where}: {' and '.join(given)} contradict each other; keep one of them")
    if given and message["role"] == "assistant" and not any(given.values()):
        message["weight"] = 0


def _says_what_is_learned(message: Message, key: str) -> bool:
    """Return whether a field seems to say if its message is learned; an id does not, and on a question only 0 or 1 does."""
    if key in _WEIGHT_KEYS:
        return True
    if not _LIKE_A_WEIGHT.search(key) or key.endswith(("_id", "_ids")):
        return False
    value = message[key]
    return message["role"] == "assistant" or (isinstance(value, bool | int | float) and value in (0, 1))


def parsed_arguments(arguments: Any) -> Any:
    """Return a tool call's arguments as an object where they are JSON text of one or are missing; else as they are."""
    if arguments is None:
        return {}
    if not isinstance(arguments, str):
        return arguments
    if not arguments.strip():
        return {}
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):  # a model may write arguments that are not JSON; the template gets the text as it is
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def with_system(messages: list[Message], system: Any, where: str, key: str) -> list[Message]:
    """Return the messages with ``system``, the text of a column of its own, as their system message; unchanged where empty."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise InputError(f"{where}: {key} is a {type(system).__name__}, not a system text; set dataset.system_key: null")
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if message_text(messages[0]).strip() != system.strip():
        raise InputError(
            f"{where} has one system text in the column {key!r} and another one in its messages; remove one, or set "
            "dataset.system_key: null to ignore the column"
        )
    return messages


def _without_null_fields(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def without_nulls(value: Any) -> Any:
    """Return plain dicts and lists without the keys whose value is None, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value
