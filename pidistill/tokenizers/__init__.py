"""Turn messages into token ids, and ids back into text.

Enters: messages and tool schemas. Leaves: ids of prompts, turns and observations, which rendering.py checks against the
messages. Read :mod:`pidistill.tokenizers.base`, the protocol, first.
"""

from typing import Any

from pidistill.errors import InputError
from pidistill.tokenizers.base import ChatTokenizer
from pidistill.tokenizers.byte import byte_tokenizer
from pidistill.tokenizers.hf_chat import HFChatTokenizer
from pidistill.tokenizers.torchtune_chat import TorchtuneChatTokenizer
from pidistill.tokenizers.word import WordTokenizer

__all__ = ["ChatTokenizer", "HFChatTokenizer", "TorchtuneChatTokenizer", "WordTokenizer", "as_chat_tokenizer", "byte_tokenizer"]


def as_chat_tokenizer(tokenizer: Any) -> ChatTokenizer:
    """Return a chat tokenizer as it is, or a torchtune tokenizer made into one."""
    if all(hasattr(tokenizer, name) for name in ("encode_prompt", "encode_turn", "encode_observations", "parse_turn")):
        return tokenizer
    if hasattr(tokenizer, "tokenize_messages"):
        return TorchtuneChatTokenizer(tokenizer)
    raise InputError(
        f"tokenizer is a {type(tokenizer).__name__}, which tokenizes no messages; set tokenizer._component_ to "
        "pidistill.tokenizers.HFChatTokenizer or to a torchtune model's tokenizer"
    )
