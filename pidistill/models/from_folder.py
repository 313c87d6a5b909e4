"""Build the decoder that a model folder's config.json describes, so that a config needs no sizes.

Dense models of the Llama, Mistral, Qwen2 and Qwen3 kinds are built from torchtune's modules. All others are transformers' own
(:mod:`pidistill.models.hf_decoder`, extra ``transformers``). Both take the arguments of torchtune's ``lora_`` builders. What
changes the numbers and is not computed here is refused in one sentence before any weight is loaded.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pidistill.errors import InputError, check_choice
from pidistill.models.config_json import check_sizes, not_computed, rotation_kind, rotations
from pidistill.models.decoder import Shape, decoder, lora
from pidistill.models.hf_folder import read_json
from pidistill.models.hf_format import FAMILIES, family, head_dim, is_tied
from pidistill.models.protocol import Decoder

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
    backend: str = "auto",
    lora_attn_modules: Sequence[str] | None = None,
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    max_seq_len: int | None = None,
    router_loss_weight: float = 0.0,
) -> Decoder:
    """Build the model of the folder ``path``, without its weights.

    Args:
        path: folder in Hugging Face's format; only its config.json is read.
        backend: whose modules: torchtune, transformers, or auto (torchtune's where they compute the model).
        lora_attn_modules: attention layers that get an adapter (q_proj, k_proj, v_proj, output_proj, or the model's own names);
            ``None`` trains all weights.
        lora_rank: as the arguments after it, the same as in torchtune's ``lora_`` builders.
        max_seq_len: longest position that the model has a rotation for; ``None`` takes config.json's max_position_embeddings.
        router_loss_weight: of the auxiliary loss that keeps a mixture's experts in use, per policy token; 0 leaves it out.
    """
    check_choice("model.backend", backend, ("auto", "torchtune", "transformers"))
    config = read_json(Path(path) / "config.json")
    check_folder(config, path)
    if lora_attn_modules is None and (quantize_base or apply_lora_to_mlp or apply_lora_to_output or use_dora):
        raise InputError(
            "model asks for adapters (quantize_base, apply_lora_to_mlp, apply_lora_to_output or use_dora) without "
            "model.lora_attn_modules; set model.lora_attn_modules, for example to [q_proj, v_proj], or remove those keys"
        )
    adapters = None if lora_attn_modules is None else (tuple(lora_attn_modules), apply_lora_to_mlp, apply_lora_to_output)
    options = {
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_dora": use_dora,
        "quantize_base": quantize_base,
    }
    other = why_not_torchtune(config, path, max_seq_len) if backend == "auto" else None
    if backend == "transformers" or other:
        return _of_transformers(path, max_seq_len, router_loss_weight, adapters, options, other)
    if router_loss_weight:
        raise InputError(
            f"model.router_loss_weight={router_loss_weight} weighs the auxiliary loss of a mixture of experts, and the "
            f"model in {path} has no experts; remove model.router_loss_weight"
        )
    shape = shape_of(config, path, max_seq_len)
    return decoder(shape, adapters and lora(*adapters, tied=shape.tie_word_embeddings, **options))


def _of_transformers(
    path: str, max_seq_len: int | None, router_loss_weight: float, adapters: Any, options: dict[str, Any], why: str | None
) -> Decoder:
    if importlib.util.find_spec("transformers") is None:
        reason = f"the model in {path} has {why}, and" if why else "model.backend=transformers:"
        raise InputError(
            f"{reason} transformers, which computes it, is not installed; run `pip install 'pidistill[transformers]'`"
        )
    from pidistill.models.hf_decoder import build
    from pidistill.models.hf_lora import adapt

    model = build(path, max_seq_len, router_loss_weight)
    if adapters is not None:
        adapt(model, lora(*adapters, tied=True, names=None, **options))
    return model


def check_folder(config: Mapping[str, Any], path: str) -> None:
    """Refuse a folder whose model cannot be trained here."""
    if config.get("is_encoder_decoder"):
        raise InputError(
            f"the model in {path} is an encoder with a decoder ({config.get('model_type')}), and only decoders can "
            "be trained; choose another model"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, Mapping) else quantization
        raise InputError(
            f"the weights in {path} are quantised ({method}, says its config.json), and training needs them in bf16 or fp32; "
            "set checkpoint_dir, and model.path where the config has it, to the unquantised model"
        )


def why_not_torchtune(config: Mapping[str, Any], path: str, max_seq_len: int | None) -> str | None:
    """Return what of a model torchtune's modules do not compute, as an end of "the model has"; None where they do.

    Raises:
        InputError: the family is one of torchtune's, and config.json lacks a size.
    """
    if config.get("model_type") not in FAMILIES:
        return f"model_type {config.get('model_type')!r}"
    family(config)
    check_sizes(config, Path(path))
    longest = max_seq_len or config.get("max_position_embeddings")
    return not_computed(config, longest) if isinstance(longest, int) else None


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
        raise InputError(f"the model in {path} has {reason}; set model.backend=transformers, or choose another model")
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
