"""Make a tokenizer of bytes in the Hugging Face format, for tests and small runs."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pidistill.jsonl import replace_file
from pidistill.tokenizers.hf_chat import HFChatTokenizer

# Ids of byte_tokenizer_folder: 256 bytes, the end of a text, the begin and the end of a message.
BYTE_VOCABULARY = 259

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer_folder(path: str | Path) -> Path:
    """Write the tokenizer files of a model that reads bytes: tokenizer.json without merges, a ChatML template, end-of-turn ids.

    Any text can be said with it, and no corpus is needed; one id is one byte of UTF-8. Several processes may write at once.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # ByteLevel's alphabet: a printable character for each byte, those of ASCII for themselves.
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": _CHATML}
    stops = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    replace_file(folder / "tokenizer.json", tokenizer.to_str().encode())
    named = {"tokenizer_class": "PreTrainedTokenizerFast"} | named
    replace_file(folder / "tokenizer_config.json", json.dumps(named).encode())
    generation = {"eos_token_id": stops, "pad_token_id": stops[1]}
    replace_file(folder / "generation_config.json", json.dumps(generation).encode())
    return folder


def byte_tokenizer(path: str, max_seq_len: int | None = None, tool_format: str = "auto") -> HFChatTokenizer:
    """Write the files of :func:`byte_tokenizer_folder` to ``path`` and return their tokenizer: a config's `tokenizer`.

    Its template has no tools; ``tool_format="action"`` writes them as text.
    """
    return HFChatTokenizer(str(byte_tokenizer_folder(path)), max_seq_len=max_seq_len, tool_format=tool_format)
