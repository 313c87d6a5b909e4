"""Make small models for tests: of a recipe you copied, of an objective you wrote, and of this package.

Everything is seeded, leaves the global random state alone, and has norm weights away from one. Fresh norm weights are all
one, and a model that applies them in the wrong place, or loads them under the wrong name, then passes every comparison.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torchtune.models.llama3 import llama3

from pidistill.errors import InputError, check_choice

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TINY_SIZES: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,  # fewer than num_heads: grouped-query attention, as in the models people train
    "embed_dim": 64,
    "intermediate_dim": 128,
    "max_seq_len": 256,
    "rope_base": 10_000,
    "norm_eps": 1e-5,
}
"""Arguments of torchtune's ``llama3``, ``llama3_2`` and ``qwen2`` builders, next to ``vocab_size``, for the models below."""

QWEN3_HEAD_DIM = 32
"""``head_dim`` of the small Qwen3, whose heads are wider than embed_dim / num_heads, as in the real ones."""


def tiny_model(vocab_size: int, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """Return a torchtune ``llama3`` of :data:`TINY_SIZES` in fp32: 0.1M parameters.

    Args:
        overrides: builder arguments that replace those of TINY_SIZES, e.g. ``num_layers=1``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = llama3(vocab_size=vocab_size, **(TINY_SIZES | overrides))
        perturb_weights(model)
    return model


@torch.no_grad()
def perturb_weights(model: nn.Module) -> None:
    """Give every one-dimensional weight (norms, biases) a value that a wrong order, place or name would show.

    Norm weights become uniform on [0.5, 1.5] and biases uniform on [-0.5, 0.5], in place, from the global random state;
    matrices stay as they are.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.uniform_(-0.5, 0.5).add_(0.0 if name.endswith("bias") else 1.0)


def tiny_hf_checkpoint(
    directory: str | Path,
    family: Literal["qwen2", "qwen3", "llama"] = "qwen2",
    *,
    tied: bool = False,
    vocab_size: int = 128,
    tokenizer: Any = None,
    seed: int = 0,
    max_shard_size: str | int | None = None,
    **overrides: Any,
) -> Path:
    """Write a small random model as the Hugging Face hub would hold it: config.json and model.safetensors, in fp32.

    ``pidistill.models.HFCheckpointer`` loads it into the builder given here, called with ``**TINY_SIZES,
    vocab_size=vocab_size``; torchtune's own does, but for Qwen3, with this ``model_type``:

    ========  ======  ==============  =============================================================
    family    tied    ``model_type``  builder
    ========  ======  ==============  =============================================================
    qwen2     either  ``QWEN2``       ``torchtune.models.qwen2.qwen2(tie_word_embeddings=tied)``
    qwen3     either                  ``pidistill.models.qwen3(head_dim=QWEN3_HEAD_DIM, tie_word_embeddings=tied)``
    llama     False   ``LLAMA3``      ``torchtune.models.llama3.llama3``
    llama     True    ``LLAMA3_2``    ``torchtune.models.llama3_2.llama3_2`` (rotary scaling included)
    ========  ======  ==============  =============================================================

    Args:
        directory: made if it does not exist.
        tokenizer: saved next to the model: a ``tokenizers.Tokenizer`` (as tokenizer.json) or anything that has
            ``save_pretrained``, such as a transformers tokenizer.
        max_shard_size: bytes, or a size such as "200KB"; larger models are several files and an index.
        overrides: config.json's values in place of those of TINY_SIZES, e.g. ``num_hidden_layers=1``.

    Returns:
        the directory.
    """
    from transformers import AutoModelForCausalLM  # a test extra: the rest of this module works without it

    check_choice("family", family, ("qwen2", "qwen3", "llama"))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        _save_tokenizer(directory, tokenizer, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_hf_config(family, tied, vocab_size, overrides)).float()
        perturb_weights(model)
    model.save_pretrained(directory, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    return directory


def _save_tokenizer(directory: Path, tokenizer: Any, vocab_size: int) -> None:
    bare = hasattr(tokenizer, "get_vocab_size")  # tokenizers.Tokenizer; transformers tokenizers have __len__ instead
    n_ids = tokenizer.get_vocab_size() if bare else len(tokenizer)
    if n_ids > vocab_size:
        raise InputError(f"the tokenizer has {n_ids} ids and the model's embedding {vocab_size} rows; raise vocab_size")
    if bare:
        tokenizer.save(str(directory / "tokenizer.json"))
    else:
        tokenizer.save_pretrained(directory)


def _hf_config(family: str, tied: bool, vocab_size: int, overrides: dict[str, Any]) -> "PretrainedConfig":
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(TINY_SIZES["rope_base"])}
    scaled = family == "llama" and tied  # as torchtune's llama3_2, whose values these are
    if scaled:
        rope |= {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 8192
    values = {
        "vocab_size": vocab_size,
        "num_hidden_layers": TINY_SIZES["num_layers"],
        "num_attention_heads": TINY_SIZES["num_heads"],
        "num_key_value_heads": TINY_SIZES["num_kv_heads"],
        "hidden_size": TINY_SIZES["embed_dim"],
        "intermediate_size": TINY_SIZES["intermediate_dim"],
        "max_position_embeddings": 131_072 if scaled else TINY_SIZES["max_seq_len"],
        "rms_norm_eps": TINY_SIZES["norm_eps"],
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,  # the usual 0.02 leaves every logit near 0, where any two models agree
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "qwen3":
        values["head_dim"] = QWEN3_HEAD_DIM
    return {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[family](**(values | overrides))
