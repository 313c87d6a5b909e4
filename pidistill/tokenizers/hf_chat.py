"""Encode chats with Hugging Face tokenizers and the model's own chat template.

Ids are those of transformers' ``apply_chat_template`` with one difference: a control token that occurs inside a message
stays text. A row, or its privileged information, cannot end a turn or open another one.
"""

import copy
import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pidistill.chat.messages import message_text, reasoning_of
from pidistill.chat.reasoning import shows_its_reasoning
from pidistill.chat.tool_calls import FORMATS, as_plain_messages, parse_turn_text
from pidistill.errors import InputError, check_choice
from pidistill.tokenizers.chat_template import ChatTemplate, TemplateRefusal, find_templates
from pidistill.tokenizers.hf_files import read_tokenizer_files
from pidistill.tokenizers.markers import any_of, mark, split_at, unused_marker, unused_word, with_sentinel
from pidistill.tokenizers.prefix import common_prefix_length
from pidistill.tokenizers.rendering import check_written
from pidistill.tokenizers.template_probes import (
    find_default_system,
    find_end_of_turn,
    find_rewritten_turns,
    find_separators,
    find_tool_format,
    shows_tools,
)
from pidistill.types import Message, Tools

_log = logging.getLogger(__name__)
_WARNED: set[str] = set()
_OPENED = re.compile(r"<think>\s*$")
_OPENED_TOKENS = 16  # at least those of the tag and of the white space behind it


class HFChatTokenizer:
    """Serve as a :class:`~pidistill.tokenizers.base.ChatTokenizer` from a folder's tokenizer.json and chat template.

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
        tool_format: how the model writes tool calls, which :meth:`parse_turn` reads: ``hermes``, ``llama3``, ``xml``,
            ``harmony``, ``action`` (schemas, calls and results as plain text, for templates that know no tools), ``none``
            (calls stay text), or ``auto``: what the template itself writes; see :mod:`pidistill.chat.tool_calls`.
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
        self._path = path
        files = read_tokenizer_files(Path(path))
        self._tokenizer = files.tokenizer
        self._templates = find_templates(files.folder, files.config, chat_template)
        self._variables = files.names | dict(template_kwargs or {})
        self._chosen_tool_format = tool_format
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.max_seq_len = max_seq_len
        self.stop_ids = files.find_stop_ids(stop_tokens)
        self.pad_id = files.find_pad_id(self.stop_ids)
        self._stop_pattern = any_of(self._tokenizer.id_to_token(i) for i in self.stop_ids)
        self._others: dict[str, HFChatTokenizer] = {}  # this tokenizer with other variables of the template
        self._read_template()
        #: What is probably wrong with the tokens that end a turn, as a sentence; None where nothing is.
        self.stop_warning = self._find_stop_warning(path) if stop_tokens is None else None
        _warn_once(self.stop_warning)

    def with_template_kwargs(self, template_kwargs: Mapping[str, Any]) -> "HFChatTokenizer":
        """Return this tokenizer with other variables of its template; variables that are not given stay as they are."""
        key = json.dumps(dict(template_kwargs), sort_keys=True, default=str)
        if key not in self._others:
            other = copy.copy(self)
            other._variables = self._variables | dict(template_kwargs)
            other._others = {}
            other._read_template()
            self._others[key] = other
        return self._others[key]

    def _read_template(self) -> None:
        """Set what follows from the template and its variables."""
        self._template = ChatTemplate(self._templates, self._variables)
        added = self._tokenizer.get_added_tokens_decoder().values()
        written = find_separators(self._template, [token.content for token in added])
        self._control_pattern = any_of(token.content for token in added if token.special or token.content in written)
        self._default_systems: dict[str, str | None] = {}
        self._rewritten: list[str] | None = None
        self.tool_format, self._plain_tools = self._find_tool_format(self._chosen_tool_format)
        self._reads_tags_without_tools = self._chosen_tool_format in ("hermes", "xml", "action")
        #: Why no sampled call is read, as a sentence that the first prompt with tools logs; None where calls are read.
        self.tool_warning = self._find_tool_warning() if self._chosen_tool_format == "auto" else None

    # ------------------------------------------------------------------------------------------- the protocol

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        if tools:
            _warn_once(self.tool_warning)
        marker = unused_marker(messages, tools)
        return self._encode(self._render(messages, tools, marker, generation_prompt=True), marker)

    def encode_turn(self, history: Sequence[Message], turn: Message, tools: Tools = None) -> list[int]:
        """Return the ids of the turn; refuse one that no model could have sampled after the prompt, as it is rendered."""
        marker = unused_marker([*history, turn], tools)
        prompt = self._render(history, tools, marker, generation_prompt=True)
        conversation = self._render([*history, turn], tools, marker, generation_prompt=False)
        if not conversation.startswith(prompt):
            said = self._after_prefill(history, turn, tools, marker, prompt)
            if said is not None:
                return self._encode(said, marker, after=prompt)
            before = self._render(history, tools, marker, generation_prompt=False).rstrip()
            if not conversation.startswith(before):
                raise InputError(
                    "the chat template writes the messages before an assistant turn in another way once the turn is there "
                    f"(...{before[-40:]!r} against ...{_divergence(before, conversation)!r}), as one does that shows the "
                    "system text or the tools with the last user message only; write the system text into the user message, or "
                    "set tokenizer.chat_template to another template"
                )
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
        """Return the ids of what follows the turn.

        Templates may rewrite the turn itself once it is answered, and end it with another token than a model does (harmony).
        Some leave out messages of a role that they do not know, which is refused.
        """
        if not history or history[-1]["role"] != "assistant":
            raise InputError("observations follow an assistant turn, and the history does not end with one")
        sentinel = unused_word([*history, *observations], tools)
        messages = [*history[:-1], with_sentinel(history[-1], sentinel), *observations]
        marker = unused_marker(messages, tools)
        text = self._render(messages, tools, marker, generation_prompt=True)
        turn = text.rfind(sentinel)
        if turn < 0:
            raise InputError(
                "the chat template leaves out the assistant turn before the observations; set tokenizer.chat_template to one "
                "that writes it"
            )
        stop = self._stop_pattern.search(text, turn)
        other = self._control_pattern.match(text, turn + len(sentinel))
        if other and (stop is None or other.start() < stop.start()):
            last = self._render(messages[: len(history)], tools, marker, generation_prompt=False)
            if self._stop_pattern.match(last, last.rfind(sentinel) + len(sentinel)):
                stop = other  # it stands where the last turn has a stop token
        if stop is None:
            raise self._no_stop_error()
        check_written("".join(split_at(text[stop.end() :], marker)), observations, None)
        return self._encode(text[stop.end() :], marker, after=text[: stop.end()])

    def encode_at_once(
        self, history: Sequence[Message], completion: Sequence[Message], tools: Tools = None
    ) -> list[tuple[list[int], list[int]]] | None:
        """Return (ids before the turn, ids of the turn) of every assistant turn of ``completion``, from few renderings.

        Rendering the conversation again for every turn costs the square of its length. None where one rendering does not show
        what :meth:`encode_turn` and :meth:`encode_observations` would give: the template rewrites turns that are followed by
        such messages, or begins turns in another way than its generation prompt.
        """
        turns = [i for i, message in enumerate(completion) if message["role"] == "assistant"]
        answers = {message["role"] for message in completion[turns[0] : turns[-1]]} - {"assistant"}
        two_in_a_row = any(b - a == 1 for a, b in itertools.pairwise(turns))
        rewritten = any(f"a {role} message" in kind for role in answers for kind in self._find_rewritten_turns())
        if turns[0] > 0 or two_in_a_row or rewritten:
            return None
        whole = [*history, *completion[: turns[-1] + 1]]
        marker = unused_marker(whole, tools)
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

    def _find_rewritten_turns(self) -> list[str]:
        if self._rewritten is None:
            self._rewritten = find_rewritten_turns(self._template)
        return self._rewritten

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def parse_turn(self, ids: Sequence[int], tools: Tools = None) -> Message:
        """Turn calls into ``tool_calls``, or a ``tool_call_error``; see :mod:`pidistill.chat.tool_calls`.

        Without tools nothing is a call, except between tags where ``tool_format`` names them: there the messages may say what
        can be called.
        """
        return self.parse_turn_after([], ids, tools)

    def parse_turn_after(self, before: Sequence[int], ids: Sequence[int], tools: Tools = None) -> Message:
        """Return what :meth:`parse_turn` does, for a turn that was sampled after ``before``.

        Where that opens the reasoning, and the turn alone does not show where it ends, it gets the tag in front: all of a turn
        that never closes the tag is reasoning, and so is what stands before the closing tag, even if it speaks of the opening.
        """
        text = self.decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)
        opened = _OPENED.search(self.decode(before[-_OPENED_TOKENS:]))
        if opened and not shows_its_reasoning(text):
            text = opened[0] + text
        is_read = tools or self._reads_tags_without_tools or self.tool_format == "harmony"  # whose answers have a channel too
        return parse_turn_text(text, self.tool_format if is_read else "none", tools)

    def default_system(self, tools: Tools = None) -> str | None:
        """Return the text s for which [system s, user] and [user] give the same prompt, found by rendering both."""
        tools = None if self._plain_tools else tools
        key = json.dumps(tools, default=str) if tools else ""
        if key not in self._default_systems:
            self._default_systems[key] = find_default_system(self._template, tools)
        return self._default_systems[key]

    def history_rewrites(self) -> str | None:
        """Return how the rendering of a conversation differs from the context that rollouts grow; None where it does not.

        Rollouts only append, so a turn stays in the context as it was sampled. A server that renders the conversation again
        for every turn shows the model what the template makes of it.
        """
        turns = self._find_rewritten_turns()
        if not turns:
            return None
        return (
            f"the chat template rewrites {', and '.join(turns)}; in training they stay in the context as they were sampled, "
            "and a server that renders the conversation through the template shows the model another context"
        )

    # ------------------------------------------------------------------------------------------- text to ids

    def _render(self, messages: Sequence[Message], tools: Tools, marker: str, *, generation_prompt: bool) -> str:
        """Return the conversation as text, with ``marker`` inside every control token that comes from a message."""
        if self._plain_tools:
            messages, tools = as_plain_messages(messages, tools, self.default_system()), None
        messages, tools = mark([list(messages), tools and list(tools)], self._control_pattern, marker)
        try:
            return self._template.render(messages, tools, generation_prompt)
        except TemplateRefusal:
            answered = _answer_malformed_calls_as_user(messages)
            if answered == messages:
                raise
            return self._template.render(answered, tools, generation_prompt)

    def _encode(self, text: str, marker: str, after: str = "") -> list[int]:
        """Return the ids of rendered text without its markers: no piece between them holds a control token of a message.

        ``after``: the text before, whose ids are already fixed; nothing is merged across the join.
        """
        first, *rest = split_at(text, marker)
        ids = self._encode_after(self._last_stretch(after, marker), first) if after else self._ids(first)
        for piece in rest:
            ids += self._encode_after("", piece)
        return ids

    def _encode_after(self, anchor: str, text: str) -> list[int]:
        """Return the ids of a text that continues another: tokenizers may put a space before a text that stands alone."""
        for before in filter(None, (anchor, "\n")):
            head, whole = self._ids(before), self._ids(before + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self._ids(text)  # the first character would merge with the text before; a model samples it on its own

    def _last_stretch(self, text: str, marker: str) -> str:
        """Return rendered text from its last control token on: nothing before that has an effect on what follows."""
        text = split_at(text, marker)[-1]
        tokens = list(self._control_pattern.finditer(text))
        return text[tokens[-1].start() :] if tokens else text

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _after_prefill(self, history: Sequence[Message], turn: Message, tools: Tools, marker: str, prompt: str) -> str | None:
        """Return what a model says where the prompt opened its reasoning, which finished turns then lack (R1).

        The turn may begin with what the prompt opens, and ends as the template ends a turn; None where it does neither that
        nor close the reasoning.
        """
        word = unused_word([*history, turn], tools)
        finished = self._render([*history, {**turn, "content": word}], tools, marker, generation_prompt=False)
        head, found, tail = finished.rpartition(word)
        stop = self._stop_pattern.match(tail)
        opened, said = prompt[len(head) :], mark(message_text(turn), self._control_pattern, marker)
        if not (found and stop and opened and prompt.startswith(head)):
            return None
        if said.startswith(opened):
            return said[len(opened) :] + stop[0]
        is_sampled = _OPENED.fullmatch(opened) and "</think>" in said and "<think>" not in said
        return said + stop[0] if is_sampled else None

    # ------------------------------------------------------------------------------------------- what the model's files say

    def _find_tool_format(self, chosen: str) -> tuple[str, bool]:
        """Return (format that turns are read in, True where tools are written as plain text instead of by the template)."""
        check_choice("tokenizer.tool_format", chosen, ("auto", *FORMATS))
        written = find_tool_format(self._template)
        if chosen not in ("auto", "action", "none", written):
            raise InputError(
                f"tokenizer.tool_format is {chosen}, but the chat template writes tool calls in another form "
                f"({written or 'an unknown one'}), so earlier calls would look different from what the model wrote; set auto, "
                "or action for a template without tools"
            )
        format = (written or "none") if chosen == "auto" else chosen
        return format, format == "action" and written != "action"

    def _find_tool_warning(self) -> str | None:
        """Return a sentence where the template shows tools, or writes calls, and no form of calls is known."""
        written, shown = find_tool_format(self._template), shows_tools(self._template)
        if written not in (None, "none") or (written == "none" and not shown):
            return None
        does = "writes tool calls in a form unknown here" if written is None else "shows tools and leaves the calls out"
        return (
            f"{self._path}: the chat template {does}, so that what the model samples stays text and calls no tool; set "
            "tokenizer.tool_format: action, which writes tools and calls as text, or tokenizer.chat_template to another one"
        )

    def _find_stop_warning(self, path: str) -> str | None:
        """Return a sentence where the template ends turns with another token than the model's files name (base models)."""
        has_stop, written = find_end_of_turn(self._template, self._stop_pattern, self._control_pattern)
        if has_stop:
            return None
        ends = f"ends an assistant turn with {written}" if written else "writes no control token after an assistant turn"
        help = f"set tokenizer.stop_tokens: ['{written}']" if written else "set tokenizer.chat_template to the model's own"
        return (
            f"{path}: the model's files name {self._stop_names()} as the end of a turn, and the chat template {ends}: what "
            f"this tokenizer's model samples may run past the end of its turn up to the token limit; {help}, or name the "
            "model's own end in tokenizer.stop_tokens"
        )

    def _stop_names(self) -> str:
        return ", ".join(sorted(self._tokenizer.id_to_token(i) for i in self.stop_ids))

    def _no_stop_error(self) -> InputError:
        return InputError(
            f"the chat template writes none of the model's stop tokens ({self._stop_names()}) after an assistant turn; set "
            "tokenizer.stop_tokens to what it writes"
        )


def _warn_once(sentence: str | None) -> None:
    if sentence is not None and sentence not in _WARNED:
        _WARNED.add(sentence)
        _log.warning("%s", sentence)


def _shape(turn: Message) -> tuple[bool, ...]:
    """Return what templates look at to choose how they write an assistant turn."""
    text = message_text(turn)
    return bool(turn.get("tool_calls")), bool(text), "</think>" in text, reasoning_of(turn) is not None


def _answer_malformed_calls_as_user(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the answers to malformed calls as the user's; some templates take results behind calls only."""
    answered, malformed = [], False
    for message in messages:
        if message["role"] != "tool":
            malformed = "tool_call_error" in message
        answered.append({**message, "role": "user"} if malformed and message["role"] == "tool" else message)
    return answered


def _divergence(prompt: str, conversation: str) -> str:
    at = common_prefix_length(prompt, conversation)
    return conversation[max(0, at - 20) : at + 20]
