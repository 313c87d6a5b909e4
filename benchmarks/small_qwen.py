"""Write what both sides of `opsd_step.py` load: a random Qwen2 whose stop token comes as asked, its tokenizer, and rows.

Random weights of a real model's shape take the time of its trained ones.
"""

import argparse
import json
import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

_NAMES = ("num_layers", "num_heads", "num_kv_heads", "embed_dim", "intermediate_dim")
SHAPES = {
    "small": dict(zip(_NAMES, (8, 6, 2, 384, 1280), strict=True)),
    "smollm2-135m": dict(zip(_NAMES, (30, 9, 3, 576, 1536), strict=True)),
    "qwen2.5-0.5b": dict(zip(_NAMES, (24, 14, 2, 896, 4864), strict=True)),
}
VOCABULARIES = {"small": 8192, "smollm2-135m": 49_152, "qwen2.5-0.5b": 151_936}
SPECIAL = ("<|im_end|>", "<|pad|>", "<|im_start|>", "user", "assistant")
STOP_ID, PAD_ID = 0, 1
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def write_model(folder: Path, arguments: argparse.Namespace) -> None:
    """Write a Qwen2 with random weights as the Hub would hold it, whose stop token comes as ``arguments.lengths`` says.

    Residual dimension 0 is a constant: every embedding has it, no block writes to it. What the stop token's (tied) embedding
    has more of it is a logit that hardly depends on the context, since the final norm divides by a length that hardly varies.
    """
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    sizes = SHAPES[arguments.shape]
    config = Qwen2Config(
        vocab_size=arguments.vocabulary,
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        hidden_size=sizes["embed_dim"],
        intermediate_size=sizes["intermediate_dim"],
        max_position_embeddings=max_seq_len(arguments),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=STOP_ID,
        pad_token_id=PAD_ID,
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        set_stop_probability(model, stop_probability(arguments))
    model.save_pretrained(folder)


def stop_probability(arguments: argparse.Namespace) -> float:
    """Return the probability per token: 1e-12, or the p for which min(geometric(p), limit) has the mean limit / 3.

    That mean is (1 - (1-p)^limit) / p.
    """
    if arguments.lengths == "equal":
        return 1e-12
    limit = arguments.new_tokens
    low, high = 1e-6, 1.0
    for _ in range(60):
        p = math.sqrt(low * high)
        low, high = (p, high) if (1 - (1 - p) ** limit) / p > limit / 3 else (low, p)
    return p


def set_stop_probability(model: torch.nn.Module, target: float) -> None:
    """Bisect dimension 0 of the stop token's embedding until its mean probability over random contexts is ``target``."""
    ids = torch.randint(len(SPECIAL), model.config.vocab_size, (8, 64))
    weight = model.model.embed_tokens.weight
    hidden = model.model(ids).last_hidden_state[:, 8:].flatten(0, 1)
    others = (hidden @ weight[STOP_ID + 1 :].T).logsumexp(-1)
    low, high = -10.0, 10.0
    for _ in range(60):
        weight[STOP_ID, 0] = (low + high) / 2
        mean = torch.sigmoid(hidden @ weight[STOP_ID] - others).mean().item()
        low, high = (weight[STOP_ID, 0].item(), high) if mean < target else (low, weight[STOP_ID, 0].item())


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    words = [*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL[:3]))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[STOP_ID], "pad_token": SPECIAL[PAD_ID]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP_ID, "pad_token_id": PAD_ID}))


def write_rows(file: Path, arguments: argparse.Namespace) -> None:
    """Write as many rows as one step takes: every step of either side answers the same prompts."""
    rng = random.Random(0)

    def text(tokens: int) -> str:
        return " ".join(f"w{rng.randrange(arguments.vocabulary - len(SPECIAL))}" for _ in range(tokens))

    rows = [
        {"question": text(arguments.question), "privileged": text(arguments.privileged), "answer": "w0"}
        for _ in range(arguments.prompts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def max_seq_len(arguments: argparse.Namespace) -> int:
    return arguments.question + arguments.privileged + arguments.new_tokens + 16


@contextmanager
def files(arguments: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", arguments)
        write_tokenizer(folder / "model", arguments.vocabulary)
        write_rows(folder / "rows.jsonl", arguments)
        yield folder
