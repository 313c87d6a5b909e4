"""Encode one id per word: the tokenizer of the tiny world and of tests."""

from collections.abc import Sequence

from pidistill.chat.messages import message_text
from pidistill.errors import InputError
from pidistill.types import Message, Tools


class WordTokenizer:
    """Serve as a :class:`~pidistill.tokenizers.base.ChatTokenizer` whose ids are the positions of ``words``.

    A prompt is ``bos`` and the words of all messages in order, whatever their roles; an assistant turn ends with the word
    ``end``. There is no generation prompt: a turn begins where the words before it end. Tool schemas are not written.

    Args:
        words: the vocabulary; ``pad``, ``bos`` and ``end`` are among them.
        max_seq_len: prompt + completion limit in tokens.
    """

    def __init__(self, words: Sequence[str], *, pad: str, bos: str, end: str, max_seq_len: int | None = None) -> None:
        self._words = list(words)
        self._ids = {word: i for i, word in enumerate(self._words)}
        self._check_words((pad, bos, end))
        self.vocab_size = len(self._words)
        self.pad_id = self._ids[pad]
        self.stop_ids = frozenset({self._ids[end]})
        self.max_seq_len = max_seq_len
        self._bos_id, self._end_id = self._ids[bos], self._ids[end]

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        return [self._bos_id, *self._encode(messages)]

    def encode_turn(self, history: Sequence[Message], turn: Message, tools: Tools = None) -> list[int]:
        return self._encode([turn])

    def encode_observations(
        self, history: Sequence[Message], observations: Sequence[Message], tools: Tools = None
    ) -> list[int]:
        return self._encode(observations)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self._words[i] for i in ids)

    def parse_turn(self, ids: Sequence[int], tools: Tools = None) -> Message:
        said = ids[:-1] if ids and ids[-1] == self._end_id else ids
        return {"role": "assistant", "content": self.decode(said)}

    def default_system(self, tools: Tools = None) -> str | None:
        return None

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        ids = []
        for message in messages:
            ids += [self._id(word) for word in message_text(message).split()]
            if message["role"] == "assistant":
                ids.append(self._end_id)
        return ids

    def _id(self, word: str) -> int:
        if word not in self._ids:
            raise InputError(f"the word {word!r} is not among the {self.vocab_size} words of the WordTokenizer")
        return self._ids[word]

    def _check_words(self, named: Sequence[str]) -> None:
        if len(self._ids) < len(self._words):
            raise InputError("the WordTokenizer's words are not all different")
        for word in self._words:
            if word.split() != [word]:
                raise InputError(f"the WordTokenizer's word {word!r} is empty or holds whitespace")
        for word in named:
            if word not in self._ids:
                raise InputError(f"the WordTokenizer's words lack {word!r}, which pad, bos or end names")
