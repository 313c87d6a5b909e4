"""Build Qwen3 (arXiv 2505.09388): Qwen2 without biases, with RMS norms over the head width of queries and keys.

Its head width is 128, which is not embed_dim / num_heads.
"""

from collections.abc import Sequence
from typing import Any

from torchtune.modules import TransformerDecoder

from pidistill.models.decoder import Shape, decoder, lora
from pidistill.models.sized import sized, sized_lora


def qwen3(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    head_dim: int = 128,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: float = 1_000_000.0,
    tie_word_embeddings: bool = False,
) -> TransformerDecoder:
    """Build Qwen3; the arguments are those of torchtune's ``qwen2``, and ``head_dim``."""
    return decoder(Shape(rotation="halves", qk_norm=True, **locals()))


def lora_qwen3(
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    head_dim: int = 128,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: float = 1_000_000.0,
    tie_word_embeddings: bool = False,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> TransformerDecoder:
    """Build Qwen3 with adapters; the arguments are those of torchtune's ``lora_qwen2``, and ``head_dim``."""
    adapters = lora(
        lora_attn_modules,
        apply_lora_to_mlp,
        apply_lora_to_output,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        quantize_base=quantize_base,
        tied=tie_word_embeddings,
    )
    shape = Shape(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        head_dim=head_dim,
        attn_dropout=attn_dropout,
        norm_eps=norm_eps,
        rope_base=rope_base,
        tie_word_embeddings=tie_word_embeddings,
        rotation="halves",
        qk_norm=True,
    )
    return decoder(shape, adapters)


# ------------------------------------------------------------------------------------------- the sizes on the Hub


def _sizes(layers: int, heads: int, width: int, intermediate: int, *, tied: bool) -> dict[str, Any]:
    """Return one model's sizes; all have 8 key heads, heads of 128, and positions up to 40,960."""
    sizes = {"num_layers": layers, "num_heads": heads, "embed_dim": width, "intermediate_dim": intermediate}
    common = {"vocab_size": 151_936, "num_kv_heads": 8, "head_dim": 128, "max_seq_len": 40_960, "rope_base": 1_000_000.0}
    return sizes | common | {"norm_eps": 1e-6, "tie_word_embeddings": tied}


# config.json of Qwen/Qwen3-<size> and Qwen/Qwen3-<size>-Base. Qwen3-4B-Instruct-2507 and -Thinking-2507 are qwen3_4b with
# rope_base=5_000_000.
_0_6B = _sizes(28, 16, 1024, 3072, tied=True)
_1_7B = _sizes(28, 16, 2048, 6144, tied=True)
_4B = _sizes(36, 32, 2560, 9728, tied=True)
_8B = _sizes(36, 32, 4096, 12_288, tied=False)
_14B = _sizes(40, 40, 5120, 17_408, tied=False)
_32B = _sizes(64, 64, 5120, 25_600, tied=False)

qwen3_0_6b = sized("qwen3_0_6b", qwen3, _0_6B)
qwen3_1_7b = sized("qwen3_1_7b", qwen3, _1_7B)
qwen3_4b = sized("qwen3_4b", qwen3, _4B)
qwen3_8b = sized("qwen3_8b", qwen3, _8B)
qwen3_14b = sized("qwen3_14b", qwen3, _14B)
qwen3_32b = sized("qwen3_32b", qwen3, _32B)

lora_qwen3_0_6b = sized_lora("lora_qwen3_0_6b", lora_qwen3, _0_6B)
lora_qwen3_1_7b = sized_lora("lora_qwen3_1_7b", lora_qwen3, _1_7B)
lora_qwen3_4b = sized_lora("lora_qwen3_4b", lora_qwen3, _4B)
lora_qwen3_8b = sized_lora("lora_qwen3_8b", lora_qwen3, _8B)
lora_qwen3_14b = sized_lora("lora_qwen3_14b", lora_qwen3, _14B)
lora_qwen3_32b = sized_lora("lora_qwen3_32b", lora_qwen3, _32B)
