"""Define what the package needs of a tokenizer: prompts, turns and observations as ids, never cut out of a rendered text."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from pidistill.types import Message, Tools


@runtime_checkable
class ChatTokenizer(Protocol):
    """Map conversations to token ids so that a conversation only ever grows at its end.

    prompt ids ++ turn ids ++ observation ids ++ turn ids ... is one growing context: what the model sampled stays as it was
    sampled, and only the new messages are encoded.
    """

    vocab_size: int  # how many ids the tokenizer can produce (a model's output may be padded to more)
    pad_id: int  # id used to fill batches; never looked at by the model
    stop_ids: frozenset[int]  # ids that end an assistant turn; the sampled one is part of the completion and is trained
    max_seq_len: int | None  # prompt + completion limit in tokens, or None

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Return the ids of the conversation, ending where the assistant turn begins (generation prompt included)."""

    def encode_turn(self, history: Sequence[Message], turn: Message, tools: Tools = None) -> list[int]:
        """Return the ids that a model would have sampled to say ``turn`` after ``encode_prompt(history)``, with a stop id."""

    def encode_observations(
        self, history: Sequence[Message], observations: Sequence[Message], tools: Tools = None
    ) -> list[int]:
        """Return the ids from right after the stop id of ``history``'s last (assistant) turn to where the next turn begins."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens included."""

    def parse_turn(self, ids: Sequence[int], tools: Tools = None) -> Message:
        """Return the assistant message that the sampled ids of one turn say; the stop id is not part of its text.

        ``tools`` are those of the prompt. Where there are none, an answer that looks like a call is an answer. A tokenizer
        that has to know the ids before the turn may have ``parse_turn_after(before, ids, tools)`` too, which is then asked.
        """

    def default_system(self, tools: Tools = None) -> str | None:
        """Return the system text that prompts get where the messages have no system message; None where they get none."""
