"""Hugging Face tokenizers with the model's own chat template.

Ids are those of transformers' ``apply_chat_template`` with one difference: a control token that occurs inside a message
stays text. A row, or its privileged information, cannot end a turn or open another one.
"""

import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pidistill.chat.messages import message_text
from pidistill.chat.tool_calls import (
    FORMATS,
    PROBE_CONVERSATION,
    PROBE_TOOL,
    as_plain_messages,
    parse_turn_text,
    written_format,
)
from pidistill.errors import InputError
from pidistill.tokenizers.chat_template import ChatTemplate, find_templates, rewritten_turns
from pidistill.tokenizers.rendering import REASONING_KEYS
from pidistill.types import Message

_log = logging.getLogger(__name__)

Tools = Sequence[dict[str, Any]] | None

_MARKERS = range(0xF0000, 0xFFFFE)  # private use: no text has a meaning for them
_PLAIN_CONVERSATION = [
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
    {"role": "user", "content": "question"},
]


class HFChatTokenizer:
    """A :class:`~pidistill.tokenizers.base.ChatTokenizer` over a model folder's tokenizer.json and chat template.

    Control tokens are the vocabulary's special tokens and whatever else added to it the template writes between the
    messages of a plain conversation. Those inside messages, tool calls and tool schemas are encoded as plain text; other
    added tokens (``<think>``, ``<tool_call>``) keep their id wherever they occur, as in inference.

    Args:
        path: folder with tokenizer.json, tokenizer_config.json and, if the model has them, generation_config.json,
            special_tokens_map.json and chat_template.jinja.
        chat_template: another template than the model's: its text, a file, or the name of one of the model's.
        max_seq_len: prompt + completion limit in tokens.
        template_kwargs: variables for the template, e.g. ``{"enable_thinking": False}``. Set a template's date here: one
            that asks for today's changes the prompts from day to day.
        stop_tokens: tokens that end an assistant turn, where the model's files name other ones than its template writes
            (base models do).
        tool_format: how the model writes tool calls, which :meth:`parse_turn` reads: ``hermes``, ``llama3``, ``action``
            (schemas, calls and results as plain text, for templates that know no tools), ``none`` (calls stay text), or
            ``auto``: what the template itself writes; see :mod:`pidistill.chat.tool_calls`.
    """

    def __init__(
        self,
        path: str,
        chat_template: str | None = None,
        max_seq_len: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        stop_tokens: Sequence[str] | None = None,
        tool_format: str = "auto",
    ) -> None:
        folder = Path(path)
        self._tokenizer = _load_tokenizer(folder)
        config = _read_json(folder / "tokenizer_config.json")
        names = _named_tokens(_read_json(folder / "special_tokens_map.json") | config)
        self._template = ChatTemplate(find_templates(folder, config, chat_template), names | dict(template_kwargs or {}))
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.max_seq_len = max_seq_len
        self.stop_ids = self._find_stop_ids(folder, names, stop_tokens)
        self.pad_id = self._find_pad_id(folder, names)
        self._stop_pattern = _any_of(self._tokenizer.id_to_token(i) for i in self.stop_ids)
        self._control_pattern = _any_of(self._find_control_tokens())
        self._default_systems: dict[str, str | None] = {}
        self.tool_format, self._plain_tools = self._find_tool_format(tool_format)
        self._reads_tags_without_tools = tool_format in ("hermes", "action")

    # ------------------------------------------------------------------------------------------- the protocol

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        marker = _unused_marker(messages, tools)
        return self._encode(self._render(messages, tools, marker, generation_prompt=True), marker)

    def encode_turn(self, history: Sequence[Message], turn: Message, tools: Tools = None) -> list[int]:
        """Raises InputError where the template renders the turn so that no model could have sampled it after the prompt."""
        marker = _unused_marker([*history, turn], tools)
        prompt = self._render(history, tools, marker, generation_prompt=True)
        conversation = self._render([*history, turn], tools, marker, generation_prompt=False)
        if not conversation.startswith(prompt):
            said = self._after_prefill(history, turn, tools, marker, prompt)
            if said is not None:
                return self._encode(said, marker, after=prompt)
            raise InputError(
                "the chat template does not render an assistant turn as a continuation of its own generation prompt "
                f"(...{prompt[-40:]!r} against ...{_divergence(prompt, conversation)!r}), so a given turn has no token ids "
                "that the model would have sampled; begin the turn with what the prompt opens (<think>), or change "
                "tokenizer.template_kwargs or tokenizer.chat_template"
            )
        stop = self._stop_pattern.search(conversation, len(prompt))
        if stop is None:
            raise self._no_stop_error()
        behind = self._stop_pattern.sub("", conversation[stop.end() :]).strip()
        if behind:
            raise InputError(
                f"the chat template writes {behind[:40]!r} after {stop[0]} within one assistant turn, where a model would have "
                "stopped; split the message in the dataset, or set tokenizer.stop_tokens"
            )
        return self._encode(conversation[len(prompt) : stop.end()], marker, after=prompt)

    def encode_observations(
        self, history: Sequence[Message], observations: Sequence[Message], tools: Tools = None
    ) -> list[int]:
        """Templates may rewrite earlier turns (drop their reasoning) once a user answers; only what follows is taken."""
        if not history or history[-1]["role"] != "assistant":
            raise InputError("observations follow an assistant turn, and the history does not end with one")
        sentinel = _unused_word([*history, *observations], tools)
        messages = [*history[:-1], _with_sentinel(history[-1], sentinel), *observations]
        marker = _unused_marker(messages, tools)
        text = self._render(messages, tools, marker, generation_prompt=True)
        turn = text.rfind(sentinel)
        if turn < 0:
            raise InputError("the chat template leaves out the assistant turn before the observations; it cannot be continued")
        stop = self._stop_pattern.search(text, turn)
        if stop is None:
            raise self._no_stop_error()
        return self._encode(text[stop.end() :], marker, after=text[: stop.end()])

    def encode_at_once(
        self, history: Sequence[Message], completion: Sequence[Message], tools: Tools = None
    ) -> list[tuple[list[int], list[int]]] | None:
        """Return (ids before the turn, ids of the turn) of every assistant turn of ``completion``, from few renderings.

        Rendering the conversation anew for every turn costs the square of its length. None where one rendering does not show
        what :meth:`encode_turn` and :meth:`encode_observations` would give: the template rewrites turns that are followed by
        such messages, or begins turns in another way than its generation prompt.
        """
        turns = [i for i, message in enumerate(completion) if message["role"] == "assistant"]
        answers = {message["role"] for message in completion[turns[0] : turns[-1]]} - {"assistant"}
        two_in_a_row = any(b - a == 1 for a, b in itertools.pairwise(turns))
        rewritten = any(f"a {role} message" in kind for role in answers for kind in self._rewritten_turns)
        if turns[0] > 0 or two_in_a_row or rewritten:
            return None
        whole = [*history, *completion[: turns[-1] + 1]]
        marker = _unused_marker(whole, tools)
        ended = self._render(history, tools, marker, generation_prompt=False)
        first = self._render(history, tools, marker, generation_prompt=True)
        last = self._render(whole[:-1], tools, marker, generation_prompt=True)
        text = self._render(whole, tools, marker, generation_prompt=False)
        spans = self._turn_spans(text, ended, first, last, len(turns))
        if spans is None:
            return None
        shapes = {_shape(completion[i]): number for number, i in reversed(list(enumerate(turns)))}
        for number in shapes.values():  # the first turn of each shape, rendered as the last one
            so_far = [*history, *completion[: turns[number] + 1]]
            if not self._render(so_far, tools, marker, generation_prompt=False).startswith(text[: spans[number][2]]):
                return None
        return self._encode_spans(text, spans, marker)

    def _turn_spans(self, text: str, ended: str, first: str, last: str, count: int) -> list[tuple[int, int, int]] | None:
        """Return (begin of the header, begin, end with the stop token) of every turn; None where they cannot be told apart.

        ``ended`` is the history without a generation prompt; ``first`` and ``last`` are the prompts of the first and last turn.
        """
        header = first.removeprefix(ended)
        if (
            not self._control_pattern.search(header)
            or header == first
            or not text.startswith(first)
            or not text.startswith(last)
        ):
            return None
        spans, at = [], len(first) - len(header)
        while len(spans) < count:
            at = text.find(header, at)
            stop = self._stop_pattern.search(text, at + len(header)) if at >= 0 else None
            if stop is None:
                return None
            spans.append((at, at + len(header), stop.end()))
            at = stop.end()
        is_whole = spans[-1][1] == len(last) and not self._stop_pattern.sub("", text[at:]).strip()
        return spans if is_whole else None

    def _encode_spans(self, text: str, spans: Sequence[tuple[int, int, int]], marker: str) -> list[tuple[list[int], list[int]]]:
        """Return the ids before and in every span; what stands before the first one is the prompt, and gives none."""
        encoded, before = [], None
        for header, begin, end in spans:
            between: list[int] = []
            if before is not None:
                between = self._encode(text[before[2] : begin], marker, after=text[before[0] : before[2]])
            encoded.append((between, self._encode(text[begin:end], marker, after=text[header:begin])))
            before = (header, begin, end)
        return encoded

    @cached_property
    def _rewritten_turns(self) -> list[str]:
        return rewritten_turns(self._template)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def parse_turn(self, ids: Sequence[int], tools: Tools = None) -> Message:
        """Turn calls into ``tool_calls``, or a ``tool_call_error``; see :mod:`pidistill.chat.tool_calls`.

        Without tools nothing is a call, except between tags where ``tool_format`` names them: there the messages may say what
        can be called.
        """
        said = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        is_read = tools or self._reads_tags_without_tools
        return parse_turn_text(self.decode(said), self.tool_format if is_read else "none")

    def default_system(self, tools: Tools = None) -> str | None:
        """Found by rendering: the text s for which [system s, user] and [user] give the same prompt."""
        tools = None if self._plain_tools else tools
        key = json.dumps(tools, default=str) if tools else ""
        if key not in self._default_systems:
            self._default_systems[key] = self._find_default_system(tools)
        return self._default_systems[key]

    def history_rewrites(self) -> str | None:
        """How the template's rendering of a conversation differs from the context that rollouts grow; None where it does not.

        Rollouts only append, so a turn stays in the context as it was sampled. A server that renders the conversation anew
        for every turn shows the model what the template makes of it.
        """
        turns = self._rewritten_turns
        if not turns:
            return None
        return (
            f"the chat template rewrites {', and '.join(turns)}; in training they stay in the context as they were sampled, "
            "and a server that renders the conversation through the template shows the model another context"
        )

    # ------------------------------------------------------------------------------------------- text to ids

    def _render(self, messages: Sequence[Message], tools: Tools, marker: str, *, generation_prompt: bool) -> str:
        """The conversation as text, with ``marker`` inside every control token that a message brought along."""
        if self._plain_tools:
            messages, tools = as_plain_messages(messages, tools, self.default_system()), None
        messages = self._mark(list(messages), marker)
        return self._template.render(messages, self._mark(tools and list(tools), marker), generation_prompt)

    def _mark(self, value: Any, marker: str) -> Any:
        if isinstance(value, str):
            return self._control_pattern.sub(lambda token: token[0][0] + marker + token[0][1:], value)
        if isinstance(value, Mapping):
            return {self._mark(key, marker): self._mark(item, marker) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(item, marker) for item in value]
        return value

    def _encode(self, text: str, marker: str, after: str = "") -> list[int]:
        """Ids of rendered text, the markers taken out: no piece between them holds a control token that a message brought.

        ``after``: the text before, whose ids are already fixed; nothing is merged across the join.
        """
        first, *rest = _split(text, marker)
        ids = self._encode_after(self._last_stretch(after, marker), first) if after else self._ids(first)
        for piece in rest:
            ids += self._encode_after("", piece)
        return ids

    def _encode_after(self, anchor: str, text: str) -> list[int]:
        """Ids of a text that continues another: tokenizers may put a space before a text that stands alone."""
        for before in filter(None, (anchor, "\n")):
            head, whole = self._ids(before), self._ids(before + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self._ids(text)  # the first character would merge with the text before; a model samples it on its own

    def _last_stretch(self, text: str, marker: str) -> str:
        """The end of rendered text from its last control token on: nothing before that has a say in what follows."""
        text = _split(text, marker)[-1]
        tokens = list(self._control_pattern.finditer(text))
        return text[tokens[-1].start() :] if tokens else text

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _after_prefill(self, history: Sequence[Message], turn: Message, tools: Tools, marker: str, prompt: str) -> str | None:
        """What a model says where the prompt has opened its reasoning and the template drops that from finished turns (R1).

        The turn begins with what the prompt opens, and ends as the template ends a turn; None where it does not.
        """
        word = _unused_word([*history, turn], tools)
        finished = self._render([*history, {**turn, "content": word}], tools, marker, generation_prompt=False)
        head, found, tail = finished.rpartition(word)
        stop = self._stop_pattern.match(tail)
        opened, said = prompt[len(head) :], self._mark(message_text(turn), marker)
        if not (found and stop and opened and prompt.startswith(head) and said.startswith(opened)):
            return None
        return said[len(opened) :] + stop[0]

    # ------------------------------------------------------------------------------------------- what the model's files say

    def _find_default_system(self, tools: Tools) -> str | None:
        user = {"role": "user", "content": "question"}
        word = _unused_word([user], tools)
        try:
            implicit = self._template.render([user], tools, False)
            explicit = self._template.render([{"role": "system", "content": word}, user], tools, False)
            if explicit.count(word) != 1:
                return None
            before, behind = explicit.split(word)
            found = implicit[len(before) : len(implicit) - len(behind)]
            again = self._template.render([{"role": "system", "content": found}, user], tools, False)
        except InputError:  # a template without a system role, or one that wants its system text non-empty
            return None
        return found if implicit == before + found + behind == again else None

    def _find_tool_format(self, chosen: str) -> tuple[str, bool]:
        """(format that turns are read in, True where tools are written as plain text instead of by the template)"""
        if chosen not in ("auto", *FORMATS):
            raise InputError(f"tokenizer.tool_format is {chosen!r}; known are auto, {', '.join(FORMATS)}")
        try:
            written = written_format(self._template.render(PROBE_CONVERSATION, [PROBE_TOOL], False))
        except InputError:  # a template that refuses tools
            written = "none"
        if chosen in ("hermes", "llama3") and written != chosen:
            raise InputError(
                f"tokenizer.tool_format is {chosen}, but the chat template writes tool calls in another form "
                f"({written or 'an unknown one'}), so earlier calls would look otherwise than the model wrote them; set auto, "
                "or action for a template without tools"
            )
        if chosen == "auto" and written is None:
            _log.warning("the chat template writes tool calls in a form unknown here: they stay text (tokenizer.tool_format)")
        format = (written or "none") if chosen == "auto" else chosen
        return format, format == "action" and written != "action"

    def _find_control_tokens(self) -> list[str]:
        added = self._tokenizer.get_added_tokens_decoder().values()
        try:
            plain = self._template.render(_PLAIN_CONVERSATION, None, False)
        except InputError:
            plain = ""
        # Some vocabularies add runs of whitespace or HTML tags; only what looks like a tag and separates turns is control.
        written = {token.content for token in added if token.content[0] in "<[" and token.content in plain}
        return [token.content for token in added if token.special or token.content in written]

    def _find_stop_ids(self, folder: Path, names: Mapping[str, str], stop_tokens: Sequence[str] | None) -> frozenset[int]:
        if stop_tokens is not None:
            return frozenset(self._id_of(token, "tokenizer.stop_tokens") for token in stop_tokens)
        stored = _eos_ids(_read_json(folder / "generation_config.json")) or _eos_ids(_read_json(folder / "config.json"))
        named = [self._id_of(names["eos_token"], "eos_token of tokenizer_config.json")] if "eos_token" in names else []
        if not stored and not named:
            raise InputError(f"{folder} names no end-of-sequence token; set tokenizer.stop_tokens to what ends a turn")
        for i in stored:
            if self._tokenizer.id_to_token(i) is None:
                raise InputError(f"eos_token_id {i} in {folder} is not an id of its tokenizer.json; set tokenizer.stop_tokens")
        return frozenset([*stored, *named])

    def _find_pad_id(self, folder: Path, names: Mapping[str, str]) -> int:
        """The model's padding token; a stop token where it has none: no position looks at padding."""
        if "pad_token" in names:
            return self._id_of(names["pad_token"], "pad_token of tokenizer_config.json")
        stored = _read_json(folder / "generation_config.json").get("pad_token_id")
        return min(self.stop_ids) if stored is None else stored

    def _id_of(self, token: str, where: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise InputError(f"{where} is {token!r}, which tokenizer.json does not have")
        return found

    def _no_stop_error(self) -> InputError:
        stops = ", ".join(sorted(self._tokenizer.id_to_token(i) for i in self.stop_ids))
        return InputError(
            f"the chat template writes none of the model's stop tokens ({stops}) after an assistant turn; set "
            "tokenizer.stop_tokens to what it writes"
        )


def _load_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "it is no folder"
        raise InputError(f"{folder} has no tokenizer.json ({held or 'it is empty'}); check tokenizer.path")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()  # the file may carry either, and both would change prompts silently
    tokenizer.no_padding()
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not valid JSON ({error}); check tokenizer.path") from error


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as strings; the files write them as strings or as {"content": ...}."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    named = {key: value.get("content") if isinstance(value, Mapping) else value for key, value in named.items()}
    return {key: value for key, value in named.items() if isinstance(value, str)}


def _eos_ids(config: Mapping[str, Any]) -> list[int]:
    ids = config.get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Longest first: a token wins over one that it contains. A one-character token has no inside for a marker."""
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _unused_marker(messages: Sequence[Message], tools: Tools) -> str:
    text = json.dumps([list(messages), tools], ensure_ascii=False, default=str)
    return next(marker for marker in map(chr, _MARKERS) if marker not in text and _escaped(marker) not in text)


def _unused_word(messages: Sequence[Message], tools: Tools) -> str:
    text = json.dumps([list(messages), tools], ensure_ascii=False, default=str)
    return next(word for word in (f"WORD{number}" for number in range(10**6, 10**9)) if word not in text)


def _escaped(marker: str) -> str:
    return json.dumps(marker)[1:-1]  # how a template that asks for ASCII-only JSON writes it


def _split(text: str, marker: str) -> list[str]:
    return text.replace(_escaped(marker), marker).split(marker)


def _shape(turn: Message) -> tuple[bool, ...]:
    """Return what templates look at to choose how they write an assistant turn."""
    text = message_text(turn)
    return bool(turn.get("tool_calls")), bool(text), "</think>" in text, any(key in turn for key in REASONING_KEYS)


def _with_sentinel(turn: Message, sentinel: str) -> Message:
    """The turn with another content, or other arguments of its last tool call: its end is then easy to find."""
    calls = turn.get("tool_calls")
    if not calls:
        return {**turn, "content": sentinel}
    function = calls[-1].get("function", calls[-1])
    as_text = isinstance(function.get("arguments"), str)
    function = {**function, "arguments": json.dumps({sentinel: sentinel}) if as_text else {sentinel: sentinel}}
    return {**turn, "tool_calls": [*calls[:-1], {**calls[-1], "function": function} if "function" in calls[-1] else function]}


def _divergence(prompt: str, conversation: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, conversation, strict=False)) if a != b), len(conversation))
    return conversation[max(0, at - 20) : at + 20]
