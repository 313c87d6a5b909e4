"""Write what both sides of `opsd_step.py` load: a model whose stop token comes as asked, its tokenizer, and rows.

The model is a random Qwen2, or a pretrained model (`--weights`) of which only the stop token's row is changed. Random weights
of a real model's shape take the time of its trained ones.
"""

import argparse
import json
import math
import random
import shutil
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
WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he", "his"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def sizes_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Return the sizes of the model, ``vocab_size`` among them."""
    if arguments.weights is None:
        return SHAPES[arguments.shape] | {"vocab_size": arguments.vocabulary or VOCABULARIES[arguments.shape]}
    config = json.loads((Path(arguments.weights) / "config.json").read_text())
    names = (
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
    )
    return dict(zip((*_NAMES, "vocab_size"), (config[name] for name in names), strict=True))


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


def write_pretrained(folder: Path, arguments: argparse.Namespace) -> None:
    """Write a pretrained model with tied embeddings whose stop token comes as ``arguments.lengths`` says.

    The stop token's row becomes the vector whose product with a hidden state comes nearest to the others' logsumexp, in least
    squares over texts that the model goes on with, plus one whose product is nearly constant. The row is read too, where a turn
    of the prompt ends, so that the fit is made twice.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(arguments.weights, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [[{"role": "user", "content": row["question"]}] for row in make_rows(arguments)]
    prompt = tokenizer.apply_chat_template(rows[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    weight, stop = model.get_input_embeddings().weight, tokenizer.eos_token_id
    torch.manual_seed(0)
    with torch.no_grad():
        answers = {"do_sample": True, "max_new_tokens": 48, "num_return_sequences": 16, "suppress_tokens": [stop], "top_k": 0}
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **answers)
        for _ in range(2):
            hidden = model.model(ids).last_hidden_state[:, prompt.shape[1] :].flatten(0, 1).double()
            logits = (hidden.float() @ weight.T).index_fill_(1, torch.tensor([stop]), -math.inf)
            others = logits.logsumexp(-1).double()
            ridge = hidden.T @ hidden + 1e-3 * hidden.square().sum(0).mean() * torch.eye(hidden.shape[1], dtype=torch.float64)
            level, one = torch.linalg.solve(ridge, hidden.T @ torch.stack([others, torch.ones_like(others)], 1)).T
            low, high = -60.0, 60.0
            for _ in range(60):
                row = level + (low + high) / 2 * one
                mean = torch.sigmoid(hidden @ row - others).mean().item()
                low, high = ((low + high) / 2, high) if mean < stop_probability(arguments) else (low, (low + high) / 2)
            weight[stop] = row.float()
    model.save_pretrained(folder)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    words = [*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL[:3]))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[STOP_ID], "pad_token": SPECIAL[PAD_ID]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP_ID, "pad_token_id": PAD_ID}))


def make_rows(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Make as many rows as one step takes: every step of either side answers the same prompts.

    Words of a pretrained model are usual ones, about as many tokens.
    """
    rng = random.Random(0)

    def word() -> str:
        return rng.choice(WORDS) if arguments.weights else f"w{rng.randrange(arguments.vocabulary - len(SPECIAL))}"

    def text(tokens: int) -> str:
        return " ".join(word() for _ in range(tokens))

    return [
        {"question": text(arguments.question), "privileged": text(arguments.privileged), "answer": "w0"}
        for _ in range(arguments.prompts)
    ]


def max_seq_len(arguments: argparse.Namespace) -> int:
    template = 64 if arguments.weights else 16
    return arguments.question + arguments.privileged + arguments.new_tokens + template


@contextmanager
def files(arguments: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.weights:
            write_pretrained(folder / "model", arguments)
        else:
            write_model(folder / "model", arguments)
            write_tokenizer(folder / "model", arguments.vocabulary)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(arguments)))
        yield folder
