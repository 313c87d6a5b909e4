"""Make small tokenizers in the formats of real ones: for HFChatTokenizer and torchtune's llama3, qwen2 and qwen2_5."""

import base64
import functools
import json
import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtune.models.llama3 import Llama3Tokenizer
from torchtune.models.qwen2 import Qwen2Tokenizer
from torchtune.models.qwen2._tokenizer import PRETOKENIZE_REGEX
from torchtune.models.qwen2_5._tokenizer import Qwen2_5Tokenizer

from tests.support.chat_templates import LLAMA31, QWEN25, R1, R1_TOOLS

CORPUS = [
    "system\nuser\nassistant\ntool\n\n",
    "You are a helpful assistant. Answer the question, reason step by step.\n\nThe final answer is 72.\n",
    "How many clips did Natalia sell altogether in April and May? user: hello\n assistant: hi <tool_response> </tool_response>",
    '{"name": "get_user_details", "arguments": {"user_id": "mia_li_3668"}} [1, 2, 3] (a + b) * c = d;\n\n\n```',
    "<|im_start|>user <|im_end|> |im_end|> <think>\n\n</think>\n\n Ünïcödé ≈ 漢字 🙂 é e\u0301",
] * 3

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"]
QWEN_ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]  # in the vocabulary, not special
LLAMA_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
]


@functools.lru_cache
def trained_bpe() -> str:
    """A byte-level BPE of 600 entries with Qwen's pre-tokenizer, as tokenizer.json without added tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    return tokenizer.to_str()


def model_folder(path: Path, template, special, added=(), *, eos, pad=None, bos=None, generation_eos=None) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json and generation_config.json, as a model on the Hub has them."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(trained_bpe())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": template}
    config |= {key: value for key, value in (("pad_token", pad), ("bos_token", bos)) if value}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if generation_eos:
        ids = [tokenizer.token_to_id(token) for token in generation_eos]
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}), encoding="utf-8")
    return path


def qwen_folder(path: Path, template=QWEN25) -> Path:
    return model_folder(
        path,
        template,
        QWEN_SPECIAL,
        QWEN_ADDED,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        generation_eos=["<|im_end|>", "<|endoftext|>"],
    )


def llama_folder(path: Path, template=LLAMA31) -> Path:
    return model_folder(
        path,
        template,
        LLAMA_SPECIAL,
        eos={"__type": "AddedToken", "content": "<|eot_id|>", "special": True},  # the other way to write it
        pad="<|finetune_right_pad_id|>",
        bos="<|begin_of_text|>",
        generation_eos=["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
    )


def r1_folder(path: Path) -> Path:
    return model_folder(
        path,
        R1,
        ["<|begin|>", "<|end|>"],
        ["<|User|>", "<|Assistant|>", "<think>", "</think>", *R1_TOOLS],
        eos="<|end|>",
        bos="<|begin|>",
    )


def spaced_folder(path: Path, scheme: str) -> Path:
    """Like Llama 2: spaces are part of the words, and one is put before a text's first word (scheme "first") or before the
    first word after every special token ("always")."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], initial_alphabet=list(string.printable), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return path


def torchtune_qwen(path: Path, version=Qwen2_5Tokenizer, max_seq_len=None, prompt_template=None):
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(trained_bpe())
    tokenizer.model.save(str(path))
    first = tokenizer.get_vocab_size()
    names = [*QWEN_SPECIAL, *(QWEN_ADDED[:2] if version is Qwen2_5Tokenizer else [])]
    return version(
        str(path / "vocab.json"),
        str(path / "merges.txt"),
        special_tokens={token: first + i for i, token in enumerate(names)},
        max_seq_len=max_seq_len,
        prompt_template=prompt_template,
    )


def torchtune_qwen2(path: Path, max_seq_len=None):
    return torchtune_qwen(path, Qwen2Tokenizer, max_seq_len)


def torchtune_llama3(path: Path, max_seq_len=None, prompt_template=None):
    """256 bytes and a few merges in tiktoken's format."""
    path.mkdir(parents=True, exist_ok=True)
    merges = [b"he", b"ll", b"ello", b"hello", b"us", b"er", b"user", b"\n\n", b" a", b"an"]
    pieces = [bytes([i]) for i in range(256)] + merges
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
    (path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    names = [*LLAMA_SPECIAL, "<|step_id|>", "<|image|>"]
    special = {token: len(pieces) + i for i, token in enumerate(names)}
    return Llama3Tokenizer(str(path / "tokenizer.model"), special, max_seq_len, prompt_template)
