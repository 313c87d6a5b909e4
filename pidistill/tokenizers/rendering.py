"""Check that the token ids of a conversation say what its messages say.

A chat template decides what of a message is written. One without tools leaves tool calls out, one without reasoning leaves
``reasoning_content`` out, and neither says so: training would learn an answer that the row does not have. The check decodes
the ids and looks for every part of the message in the text, without regard to spaces. Its cost is linear in the text.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pidistill.chat.messages import REASONING_KEYS, REASONING_PARTS, message_text
from pidistill.errors import InputError
from pidistill.tokenizers.base import ChatTokenizer
from pidistill.types import Message, Tools

_ACTION = (
    "set tokenizer.tool_format: action, which writes tools and calls as text, or tokenizer.chat_template to one with tools"
)
_REASONING = (
    "write the reasoning into the content between <think> and </think>, set tokenizer.chat_template to one that writes it, or "
    "remove the key"
)
_CONTENT = "set tokenizer.chat_template to one that writes it, or change the role of the message"
_CONTENT_WITH_CALLS = "set tokenizer.tool_format: action, which writes text beside calls, or leave the text out of the row"


class TextLeftOut(InputError):
    """Say that the chat template leaves out a part of a message, or a tool."""


@dataclass(frozen=True)
class Part:
    """Hold a piece of text that must be in the rendered conversation."""

    name: str  # what it is, for the sentence that refuses the row
    forms: tuple[str, ...]  # the ways in which a template may write it; one of them must occur
    advice: str  # which key helps where it is missing


@dataclass(frozen=True)
class Piece:
    """Hold the ids of one assistant turn (``turn`` is its message), or of what stands between two turns (``turn`` is None)."""

    ids: list[int]
    turn: Message | None


def encode_completion(
    tokenizer: ChatTokenizer,
    history: Sequence[Message],
    completion: Sequence[Message],
    tools: Tools,
    where: str,
) -> list[Piece]:
    """Return the ids of the completion's messages after ``history``, piece by piece; messages after the last turn are left out.

    Two assistant messages in a row have the template's header of a turn between them.
    """
    groups = list(_turns_with_answers(completion))
    at_once = getattr(tokenizer, "encode_at_once", None)  # of tokenizers that can find all turns in one rendering
    try:
        encoded = at_once(history, completion, tools) if at_once else None
        if encoded is None:
            encoded = _encode_one_by_one(tokenizer, history, groups, tools)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    pieces = []
    for number, ((between, turn), (between_ids, turn_ids)) in enumerate(zip(groups, encoded, strict=True), start=1):
        if pieces:
            pieces.append(Piece(between_ids, None))
            check_written(tokenizer.decode(between_ids), between, f"{where}: before turn {number}")
        pieces.append(Piece(turn_ids, turn))
        check_written(tokenizer.decode(turn_ids), [turn], f"{where}: turn {number}", reasoning=True)
    return pieces


def _turns_with_answers(completion: Sequence[Message]) -> Iterator[tuple[list[Message], Message]]:
    """Yield every assistant message with the other messages that stand directly before it."""
    between: list[Message] = []
    for message in completion:
        if message["role"] == "assistant":
            yield between, message
            between = []
        else:
            between.append(message)


def _encode_one_by_one(
    tokenizer: ChatTokenizer,
    history: Sequence[Message],
    groups: Sequence[tuple[list[Message], Message]],
    tools: Tools,
) -> list[tuple[list[int], list[int]]]:
    """Return (ids before the turn, ids of the turn) of every turn; each is rendered after all that stands before it."""
    history, encoded = list(history), []
    for between, turn in groups:
        try:
            between_ids = tokenizer.encode_observations(history, between, tools) if encoded else []
            turn_ids = tokenizer.encode_turn([*history, *between], turn, tools)
        except InputError as error:
            if between or not encoded:
                raise
            raise InputError(f"turns {len(encoded)} and {len(encoded) + 1} are two assistant messages in a row, which the chat "
                             f"template does not take ({error}); join them into one message") from error  # fmt: skip
        history += [*between, turn]
        encoded.append((between_ids, turn_ids))
    return encoded


def check_written(
    text: str,
    messages: Sequence[Message],
    where: str | None,
    *,
    tools: Tools = None,
    reasoning: bool = False,
) -> None:
    """Raise InputError, with the key that helps, where ``text`` lacks a part of the messages or the name of a tool."""
    parts = [part for message in messages for part in message_parts(message, reasoning=reasoning)]
    missing = find_missing(text, [*parts, *(_tool_part(tool) for tool in tools or [])])
    if missing is not None:
        shown = missing.forms[0] if len(missing.forms[0]) <= 60 else missing.forms[0][:60] + "…"
        sentence = f"the chat template leaves out {missing.name} {shown!r}; {missing.advice}"
        raise TextLeftOut(f"{where}: {sentence}" if where else sentence)


def message_parts(message: Message, *, reasoning: bool = False) -> Iterator[Part]:
    """Yield what a rendering of the message must have: its content, its calls and, if asked for, its reasoning."""
    calls = message.get("tool_calls") or []
    for piece in _content_pieces(message, reasoning):
        yield Part(f"the content of the {message['role']} message", _forms(piece), _CONTENT_WITH_CALLS if calls else _CONTENT)
    if reasoning:
        # What is no text is written by no template, so that a message which was not checked is refused by it.
        given = (message[key] for key in (*REASONING_KEYS, *REASONING_PARTS) if message.get(key))
        for text in dict.fromkeys(value if isinstance(value, str) else repr(value) for value in given):
            yield Part("the reasoning of the assistant message", _forms(text), _REASONING)
    for call in calls:
        function = call.get("function", call)
        yield Part("the name of the call", (function["name"],), _ACTION)
        for value in _leaves(function.get("arguments", {})):
            yield Part(f"an argument of the call of {function['name']},", _forms(value), _ACTION)


def _content_pieces(message: Message, is_learned: bool) -> list[str]:
    """Return the texts of the content that must be written.

    Prompts may open the reasoning of a turn, and templates write its tags themselves. Of an earlier turn, templates leave the
    reasoning out on purpose, and Llama's leave out the text beside a call; a server shows the model the same.
    """
    text = message_text(message)
    if message["role"] != "assistant":
        return [text]
    pieces = re.split(r"</?think>", text)
    if is_learned:
        return pieces
    return [] if message.get("tool_calls") else pieces[-1:]


def _tool_part(tool: Mapping[str, Any]) -> Part:
    function = tool.get("function", tool)
    return Part("the tool", (str(function.get("name", "")),), _ACTION)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys and the values inside an argument; ones without text yield nothing."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _forms(value: Any) -> tuple[str, ...]:
    """Return the ways in which templates write a value: as it is, inside JSON text, inside JSON text within JSON, as Python."""
    if not isinstance(value, str):
        return tuple(dict.fromkeys([json.dumps(value), str(value)]))
    forms = [value]
    for as_ascii in (False, True):
        inside = json.dumps(value, ensure_ascii=as_ascii)[1:-1]
        forms += [inside, json.dumps(inside, ensure_ascii=as_ascii)[1:-1]]
    return tuple(dict.fromkeys([*forms, repr(value)[1:-1]]))


def find_missing(text: str, parts: Sequence[Part]) -> Part | None:
    """Return the first of the parts that ``text`` lacks, or None.

    A place in the text counts for one part, so that an answer "5" is not found inside the reasoning that was written. Where the
    parts do not stand in their order, one behind the other, the longest take their places first; equal ones are counted
    together, and each kind of part reads the text once.
    """
    left = _compact(text)
    if _stand_in_order(left, parts):
        return None
    wanted: dict[tuple[str, ...], list[Part]] = {}
    missing: list[Part] = []
    for part in parts:
        forms = tuple(filter(None, map(_compact, part.forms)))
        if _compact(part.forms[0]):  # white space alone need not be written, though its escapes are text
            wanted.setdefault(forms, []).append(part)
    for forms, same in sorted(wanted.items(), key=lambda item: -len(item[0][0])):
        for form in forms:
            pieces = left.split(form, len(same))
            left = "\0".join(pieces)
            same = same[len(pieces) - 1 :]
            if not same:
                break
        missing += same
    return min(missing, key=parts.index, default=None)


def _stand_in_order(text: str, parts: Sequence[Part]) -> bool:
    """Return whether the compact ``text`` has a place for each part behind the place of the part before it."""
    at = 0
    for part in parts:
        forms = [form for form in map(_compact, part.forms) if form] if _compact(part.forms[0]) else []
        ends = [found + len(form) for form in forms if (found := text.find(form, at)) >= 0]
        if forms and not ends:
            return False
        at = min(ends, default=at)
    return True


def _compact(text: str) -> str:
    """Return the text without spaces and in one Unicode form: templates strip texts, and some tokenizers normalise them."""
    return "".join(unicodedata.normalize("NFKC", text).split())
