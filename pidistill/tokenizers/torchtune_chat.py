"""Serve any torchtune ``ModelTokenizer`` as a chat tokenizer.

torchtune's tokenizers turn whole conversations into ids and cut them at ``max_seq_len``. Prompts, turns and observations are
found here by tokenizing conversations that differ in one assistant message only; nothing is cut.
"""

import copy
import inspect
import json
from collections.abc import Sequence
from typing import Any

from torchtune.data import Message as TorchtuneMessage
from torchtune.models.qwen2 import Qwen2Tokenizer

from pidistill.chat.messages import message_text
from pidistill.errors import InputError
from pidistill.tokenizers.prefix import common_prefix_length
from pidistill.types import Message, Tools

# Answers whose ids share no first token with each other, with a stop token or with the text before them: what a prompt with
# each of them has in common is the prompt. The empty one rules out a shared leading-space token.
_PROBES = ("A", "B", "")


class TorchtuneChatTokenizer:
    """Serve as a :class:`~pidistill.tokenizers.base.ChatTokenizer` over a torchtune tokenizer (llama3, qwen2, ...).

    Roles: ``tool`` becomes torchtune's ``ipython``; an assistant message with one tool call and no text becomes an
    ``ipython=True`` message that holds the call as JSON. torchtune writes no tool schemas and no default system text; a
    model's own template, which does, comes with :class:`~pidistill.tokenizers.hf_chat.HFChatTokenizer`.

    Some torchtune tokenizers (Qwen's) parse control tokens inside message text. Such a text is handed over in pieces, none
    of which holds a whole control token, so that it stays text.

    Args:
        tokenizer: a torchtune ``ModelTokenizer``; its ``max_seq_len`` becomes the prompt + completion limit; it is not changed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.max_seq_len: int | None = tokenizer.max_seq_len
        self._tokenizer = copy.copy(tokenizer)
        self._tokenizer.max_seq_len = None  # torchtune silently cuts what is longer
        self._specials = {text: i for text, i in (getattr(tokenizer, "special_tokens", None) or {}).items() if len(text) > 1}
        self._parsed_tokens = self._find_parsed_tokens()
        self.stop_ids = self._find_stop_ids()
        pad_id = getattr(tokenizer, "pad_id", None)
        self.pad_id = min(self.stop_ids) if pad_id is None or pad_id < 0 else pad_id
        self.vocab_size = self._find_vocab_size()

    # ------------------------------------------------------------------------------------------- the protocol

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Return the longest beginning that conversations share which differ in their last message, the assistant's."""
        _refuse_tools(tools)
        variants = [self._tokenize([*messages, {"role": "assistant", "content": probe}]) for probe in _PROBES]
        return variants[0][: min(common_prefix_length(variants[0], other) for other in variants[1:])]

    def encode_turn(self, history: Sequence[Message], turn: Message, tools: Tools = None) -> list[int]:
        prompt = self.encode_prompt(history, tools)
        conversation = self._tokenize([*history, turn])
        if conversation[: len(prompt)] != prompt:
            raise InputError("the torchtune tokenizer merges the assistant turn into the prompt before it; use HFChatTokenizer")
        return self._up_to_stop(conversation[len(prompt) :])

    def encode_observations(
        self, history: Sequence[Message], observations: Sequence[Message], tools: Tools = None
    ) -> list[int]:
        if not history or history[-1]["role"] != "assistant":
            raise InputError("observations follow an assistant turn, and the history does not end with one")
        before = self.encode_prompt(history[:-1], tools)
        turn = history[-1] if history[-1].get("tool_calls") else {"role": "assistant", "content": _PROBES[0]}
        after = self.encode_prompt([*history[:-1], turn, *observations], tools)[len(before) :]
        return after[len(self._up_to_stop(after)) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; ids beyond the vocabulary, which a model with padded output can sample, have none."""
        accepted = inspect.signature(self._tokenizer.decode).parameters
        wanted = {"truncate_at_eos": False, "skip_special_tokens": False}
        known = [i for i in ids if i < self.vocab_size]
        return self._tokenizer.decode(known, **{key: value for key, value in wanted.items() if key in accepted})

    def parse_turn(self, ids: Sequence[int], tools: Tools = None) -> Message:
        said = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return {"role": "assistant", "content": self.decode(said)}

    def default_system(self, tools: Tools = None) -> str | None:
        return None

    # ------------------------------------------------------------------------------------------- messages to ids

    def _tokenize(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenizer.tokenize_messages([self._message(message) for message in messages])[0]

    def _message(self, message: Message) -> TorchtuneMessage:
        role = message["role"]
        if role == "tool" and type(self._tokenizer) is Qwen2Tokenizer:
            raise InputError("torchtune's Qwen2 tokenizer writes tool results without a header; use HFChatTokenizer or qwen2_5")
        if message.get("tool_calls"):
            # eot=False: the end-of-message token, after which the tool answers
            return TorchtuneMessage(role="assistant", content=self._content(_tool_call_json(message)), ipython=True, eot=False)
        return TorchtuneMessage(role="ipython" if role == "tool" else role, content=self._content(message_text(message)))

    def _content(self, text: str) -> list[dict[str, str]]:
        """Return the text as torchtune's content items; more than one only where a control token occurs in it."""
        cuts = [0]
        at = 0
        while self._parsed_tokens and at < len(text):
            token = next((token for token in self._parsed_tokens if text.startswith(token, at)), None)
            if token is not None:
                cuts.append(at + 1)
            at += len(token) if token else 1
        pieces = [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
        return [{"type": "text", "content": piece} for piece in pieces]

    def _up_to_stop(self, ids: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(ids) if token in self.stop_ids), None)
        if end is None:
            raise InputError(
                f"the torchtune tokenizer ends an assistant turn without one of its stop tokens {set(self.stop_ids)}; use "
                "HFChatTokenizer"
            )
        return ids[:end]

    # ------------------------------------------------------------------------------------------- what the tokenizer is

    def _find_parsed_tokens(self) -> list[str]:
        """Return the control tokens that encoding a text would turn into their id, longest first.

        Tags without bars (``<tool_call>``) are markup that models read and write as text does, not ends of turns.
        """
        encode = self._tokenizer.encode
        bars = [(text, i) for text, i in self._specials.items() if "|" in text]
        return sorted((text for text, i in bars if i in encode(text, add_bos=False, add_eos=False)), key=len, reverse=True)

    def _find_stop_ids(self) -> frozenset[int]:
        stops = getattr(self._tokenizer, "stop_tokens", None) or [getattr(self._tokenizer, "eos_id", None)]
        stops = frozenset(i for i in stops if i is not None)
        if not stops:
            raise InputError(
                f"{type(self._tokenizer).__name__} has neither stop_tokens nor an eos_id, so it cannot end a turn; choose "
                "another `tokenizer`"
            )
        return stops

    def _find_vocab_size(self) -> int:
        sizes = [getattr(self._tokenizer, "vocab_size", 0), len(getattr(self._tokenizer, "encoder", ()))]
        return max(*sizes, *(i + 1 for i in self._specials.values()))


def _tool_call_json(message: Message) -> str:
    calls = message["tool_calls"]
    if len(calls) != 1 or message_text(message):
        raise InputError(
            f"torchtune's tokenizers write one tool call per turn and no text beside it; this turn has {len(calls)} calls "
            f"and {len(message_text(message))} characters of text; use HFChatTokenizer"
        )
    function = calls[0].get("function", calls[0])
    return json.dumps({"name": function["name"], "arguments": function.get("arguments", {})}, ensure_ascii=False)


def _refuse_tools(tools: Tools) -> None:
    if tools:
        raise InputError("torchtune's tokenizers write no tool schemas; use HFChatTokenizer or a system message")
