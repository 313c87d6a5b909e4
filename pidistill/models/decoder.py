"""Build one dense decoder from torchtune's modules: RMS norms, grouped-query attention, rotary positions, SwiGLU.

Llama, SmolLM2, TinyLlama, Mistral, Qwen2, Qwen2.5 and Qwen3 differ only in what :class:`Shape` says. ``Shape`` holds what a
model's config.json holds, and :class:`Lora` holds which of its linear layers are adapted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.common_utils import reparametrize_as_dtype_state_dict_post_hook
from torchtune.modules.peft import DoRALinear, LoRALinear

from pidistill.errors import InputError
from pidistill.models.qwen3_attention import Qwen3Attention

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "output_proj")
Rotation = Literal["neighbours", "halves"]


@dataclass(frozen=True)
class Shape:
    """Describe a dense decoder."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    rope_base: float
    norm_eps: float
    # Which entries of a head are rotated together. Llama's checkpoints are stored for "neighbours" once their query and key
    # rows are permuted; Qwen's are stored for "halves".
    rotation: Rotation
    tie_word_embeddings: bool = False
    # Arguments of torchtune's `Llama3ScaledRoPE` (Llama 3.1's scaling), or empty for plain rotations.
    rope_scaling: Mapping[str, float] = field(default_factory=dict)
    attention_bias: tuple[str, ...] = ()  # the projections that have a bias
    qk_norm: bool = False  # queries and keys have an RMS norm over the head width (Qwen3)
    attn_dropout: float = 0.0


@dataclass(frozen=True)
class Lora:
    """Say which linear layers are adapted, and how. Without ``modules`` nothing is adapted."""

    modules: tuple[str, ...] = ()
    mlp: bool = False
    output: bool = False
    quantize_base: bool = False
    use_dora: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of every adapted layer: rank, alpha, dropout

    def linear(self, in_dim: int, out_dim: int, *, adapted: bool, bias: bool = False, quantize: bool = True) -> nn.Module:
        """Return a linear layer, with an adapter if it is ``adapted``."""
        if not adapted:
            return nn.Linear(in_dim, out_dim, bias=bias)
        kind = DoRALinear if self.use_dora else LoRALinear
        return kind(in_dim, out_dim, use_bias=bias, quantize_base=self.quantize_base and quantize, **self.arguments)


def lora(
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool,
    apply_lora_to_output: bool,
    *,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float,
    use_dora: bool,
    quantize_base: bool,
    tied: bool,
    names: Sequence[str] | None = ATTENTION_MODULES,
) -> Lora:
    """Return the adapters that torchtune's ``lora_`` arguments describe.

    Args:
        names: the attention layers that there are; None where the model itself has to say.
    """
    unknown = set() if names is None else set(lora_attn_modules) - set(names)
    if unknown or not lora_attn_modules:
        named = f"has {', '.join(sorted(unknown))}" if unknown else "is empty"
        raise InputError(f"model.lora_attn_modules {named}; choose one or more of {', '.join(ATTENTION_MODULES)}")
    if tied and apply_lora_to_output:
        raise InputError(
            "model.apply_lora_to_output=True, and this model's output head is its embedding (tied), which takes no adapter; "
            "set model.apply_lora_to_output=False"
        )
    return Lora(
        modules=tuple(lora_attn_modules),
        mlp=apply_lora_to_mlp,
        output=apply_lora_to_output,
        quantize_base=quantize_base,
        use_dora=use_dora,
        arguments={"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout},
    )


def decoder(shape: Shape, adapters: Lora | None = None) -> TransformerDecoder:
    """Build the decoder that ``shape`` describes, with ``adapters`` on its linear layers."""
    adapters = adapters or Lora()
    rope = _rotations(shape)  # one for all layers: its table of angles takes max_seq_len · head_dim · 4 bytes
    layers = [
        TransformerSelfAttentionLayer(
            attn=_attention(shape, adapters, rope),
            mlp=_feed_forward(shape, adapters),
            sa_norm=RMSNorm(shape.embed_dim, eps=shape.norm_eps),
            mlp_norm=RMSNorm(shape.embed_dim, eps=shape.norm_eps),
        )
        for _ in range(shape.num_layers)
    ]
    embeddings = nn.Embedding(shape.vocab_size, shape.embed_dim)
    # The output head is never quantised, as in torchtune's builders.
    head = adapters.linear(shape.embed_dim, shape.vocab_size, adapted=adapters.output, quantize=False)
    model = TransformerDecoder(
        tok_embeddings=embeddings,
        layers=nn.ModuleList(layers),
        max_seq_len=shape.max_seq_len,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        norm=RMSNorm(shape.embed_dim, eps=shape.norm_eps),
        output=TiedLinear(embeddings) if shape.tie_word_embeddings else head,
    )
    if adapters.quantize_base:
        # As torchtune's builders do: state dicts hold the weights in full precision.
        dtype = model.tok_embeddings.weight.dtype
        hook = partial(reparametrize_as_dtype_state_dict_post_hook, dtype=dtype, offload_to_cpu=True)
        model._register_state_dict_hook(hook)
    return model


def _attention(shape: Shape, adapters: Lora, rope: nn.Module) -> MultiHeadAttention:
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {
        "q_proj": (shape.embed_dim, queries),
        "k_proj": (shape.embed_dim, keys),
        "v_proj": (shape.embed_dim, keys),
        "output_proj": (queries, shape.embed_dim),
    }
    projections = {
        name: adapters.linear(*size, adapted=name in adapters.modules, bias=name in shape.attention_bias)
        for name, size in sizes.items()
    }
    norms = {name: RMSNorm(shape.head_dim, eps=shape.norm_eps) for name in ("q_norm", "k_norm")} if shape.qk_norm else {}
    return (Qwen3Attention if shape.qk_norm else MultiHeadAttention)(
        embed_dim=shape.embed_dim,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        pos_embeddings=rope,
        max_seq_len=shape.max_seq_len,
        attn_dropout=shape.attn_dropout,
        **projections,
        **norms,
    )


def _feed_forward(shape: Shape, adapters: Lora) -> FeedForward:
    wide, narrow = shape.intermediate_dim, shape.embed_dim
    return FeedForward(
        gate_proj=adapters.linear(narrow, wide, adapted=adapters.mlp),
        down_proj=adapters.linear(wide, narrow, adapted=adapters.mlp),
        up_proj=adapters.linear(narrow, wide, adapted=adapters.mlp),
    )


def _rotations(shape: Shape) -> nn.Module:
    sizes = {"dim": shape.head_dim, "max_seq_len": shape.max_seq_len, "base": shape.rope_base}
    if shape.rope_scaling:
        return Llama3ScaledRoPE(**sizes, **shape.rope_scaling)
    return (Qwen2RotaryPositionalEmbeddings if shape.rotation == "halves" else RotaryPositionalEmbeddings)(**sizes)
