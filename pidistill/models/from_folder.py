"""Build the decoder that a model folder's config.json describes, so that a config needs no sizes.

Dense models of the Llama, Mistral, Qwen2 and Qwen3 kinds are built from torchtune's modules, with the arguments that
torchtune's ``lora_`` builders take. Whatever changes the numbers and is not computed here is refused in one sentence before any
weight is loaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtune.modules import TransformerDecoder

from pidistill.errors import InputError
from pidistill.models.config_json import check_sizes, not_computed, rotation_kind, rotations
from pidistill.models.decoder import Shape, decoder, lora
from pidistill.models.hf_folder import read_json
from pidistill.models.hf_format import family, head_dim, is_tied

# config.json's names, and those of torchtune's Llama3ScaledRoPE
LLAMA3_SCALING = {
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def from_folder(
    path: str,
    lora_attn_modules: Sequence[str] | None = None,
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    max_seq_len: int | None = None,
) -> TransformerDecoder:
    """Build the model of the folder ``path``, without its weights.

    Args:
        path: folder in Hugging Face's format; only its config.json is read.
        lora_attn_modules: attention layers that get an adapter (q_proj, k_proj, v_proj, output_proj); ``None`` trains all
            weights.
        lora_rank: as the arguments after it, the same as in torchtune's ``lora_`` builders.
        max_seq_len: longest position that the model has a rotation for; ``None`` takes config.json's max_position_embeddings.
    """
    shape = shape_of(read_json(Path(path) / "config.json"), path, max_seq_len)
    if lora_attn_modules is None:
        if quantize_base or apply_lora_to_mlp or apply_lora_to_output or use_dora:
            raise InputError(
                "model asks for adapters (quantize_base, apply_lora_to_mlp, apply_lora_to_output or use_dora) without "
                "model.lora_attn_modules; set model.lora_attn_modules, for example to [q_proj, v_proj], or remove those keys"
            )
        return decoder(shape)
    adapters = lora(
        lora_attn_modules,
        apply_lora_to_mlp,
        apply_lora_to_output,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        quantize_base=quantize_base,
        tied=shape.tie_word_embeddings,
    )
    return decoder(shape, adapters)


def shape_of(config: Mapping[str, Any], path: str, max_seq_len: int | None = None) -> Shape:
    """Return the shape that a config.json describes, with ``max_seq_len`` in place of its longest position."""
    name = family(config)
    check_sizes(config, Path(path))
    longest = max_seq_len or config.get("max_position_embeddings")
    if not isinstance(longest, int) or longest < 1:
        raise InputError(
            f"{path}/config.json has max_position_embeddings {longest!r}; set model.max_seq_len to the longest prompt with its "
            "completion, in tokens"
        )
    if reason := not_computed(config, longest):
        raise InputError(
            f"the model in {path} has {reason}; choose another model, or set `model` to a builder that computes it"
        )
    rope = rotations(config)
    return Shape(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=head_dim(config),
        embed_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        max_seq_len=longest,
        rope_base=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        rope_scaling={ours: rope[theirs] for theirs, ours in LLAMA3_SCALING.items()} if rotation_kind(rope) == "llama3" else {},
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rotation="halves" if name.startswith("qwen") else "neighbours",
        tie_word_embeddings=is_tied(config),
        attention_bias=_QKV if name == "qwen2" else (),
        qk_norm=name == "qwen3",
    )
