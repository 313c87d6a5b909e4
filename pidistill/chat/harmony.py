"""Read turns of gpt-oss in its harmony form: messages with a channel each, of which one may be a call.

    <|channel|>analysis<|message|>REASONING<|end|><|start|>assistant<|channel|>final<|message|>ANSWER
    <|channel|>analysis<|message|>REASONING<|end|><|start|>assistant to=functions.NAME<|channel|>commentary json<|message|>{...}

The recipient of a call may also stand behind the channel, where the model writes it. A turn ends with its call.
"""

import re
from typing import Any

from pidistill.chat.call_json import MalformedCall, function_call, read_json
from pidistill.types import Message

_NEXT_MESSAGE = re.compile(r"<\|end\|>\s*<\|start\|>assistant")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CONTROL = re.compile(r"<\|(?:start|end|message|channel|constrain|call|return)\|>")


def read_harmony(text: str) -> Message:
    """Return the assistant message that a turn without its stop token says.

    ``content`` is what is said to the user (final, and commentary without a recipient), ``reasoning_content`` the analysis. A
    turn that the token limit cut in its analysis has no content; text without any control token is the content.

    Raises:
        MalformedCall: the turn is not a row of messages, or its call cannot be read.
    """
    if not _CONTROL.search(text):
        return {"role": "assistant", "content": text}
    said: dict[str, list[str]] = {"analysis": [], "commentary": [], "final": []}
    calls: list[dict[str, Any]] = []
    for piece in _NEXT_MESSAGE.split(text):
        channel, recipient, body = _read_message(piece)
        if calls:
            raise MalformedCall("a message follows the tool call; the turn ends with its call")
        if recipient is None:
            said[channel].append(body)
        else:
            calls.append(_read_call(recipient, body))
    message: Message = {"role": "assistant", "content": "\n\n".join([*said["commentary"], *said["final"]])}
    reasoning = said["analysis"]
    if calls:  # a template takes the reasoning or the text beside a call, not both
        reasoning, message["content"] = [*reasoning, *filter(None, [message["content"]])], ""
        message["tool_calls"] = calls
    return message | ({"reasoning_content": "\n\n".join(reasoning)} if reasoning else {})


def _read_message(piece: str) -> tuple[str, str | None, str]:
    """Return the channel, the recipient and the body of one message."""
    header, found, body = piece.partition("<|message|>")
    channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
    if not found or channel is None:
        raise MalformedCall(f"a message is not <|channel|>...<|message|>...: {piece.strip()[:80]}")
    if channel[1] not in ("analysis", "commentary", "final"):
        raise MalformedCall(f"the channel {channel[1]} is none of analysis, commentary and final")
    if _CONTROL.search(body):
        raise MalformedCall(f"a message of the channel {channel[1]} holds a control token: {body.strip()[:80]}")
    return channel[1], recipient and recipient[1], body


def _read_call(recipient: str, body: str) -> dict[str, Any]:
    name, arguments = recipient.removeprefix("functions."), read_json(body)
    if not name or not isinstance(arguments, dict):
        raise MalformedCall(f"the arguments of the call of {recipient} must be a JSON object")
    return function_call(name, arguments)
