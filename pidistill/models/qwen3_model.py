"""Qwen3 (arXiv 2505.09388) from torchtune's modules: Qwen2 without biases, with RMS norms over the head width of queries and
keys, and a head width of its own (128, which is not embed_dim / num_heads).

The norms come before the rotation, q = RoPE(norm(W_q·x)), and torchtune's MultiHeadAttention would rotate first. With weights
of one the two agree, since a rotation keeps lengths; with trained ones they do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.models.qwen2._component_builders import lora_qwen2_mlp, qwen2_mlp
from torchtune.modules import MultiHeadAttention, RMSNorm, TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.common_utils import reparametrize_as_dtype_state_dict_post_hook
from torchtune.modules.peft import DoRALinear, LoRALinear

from pidistill.errors import InputError
from pidistill.models.sized import sized, sized_lora

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "output_proj")


class Qwen3Attention(MultiHeadAttention):
    """torchtune's attention with the norms before the rotation; ``_attention_call`` and ``kv_cache`` are used as there."""

    def forward(self, x: Tensor, y: Tensor | None = None, *, mask: Any = None, input_pos: Tensor | None = None) -> Tensor:
        """x, y [B, T, D] (the same, as it is self-attention) → [B, T, D]."""
        q = self._rotated(self.q_norm(self._heads(self.q_proj(x))), input_pos)
        k = self._rotated(self.k_norm(self._heads(self.k_proj(y))), input_pos)
        v = self._heads(self.v_proj(y)).transpose(1, 2)
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        if self.num_heads != self.num_kv_heads:
            k, v = (self._repeated(t) for t in (k, v))
        out = self._attention_call(
            q,
            k,
            v,
            mask=mask,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=self.kv_cache is None and mask is None and self.is_causal,
        )
        return self.output_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:  # [B, T, heads * d] → [B, T, heads, d]
        return x.unflatten(-1, (-1, self.head_dim))

    def _rotated(self, x: Tensor, input_pos: Tensor | None) -> Tensor:  # [B, T, heads, d] → [B, heads, T, d]
        return self.pos_embeddings(x, input_pos=input_pos).transpose(1, 2)

    def _repeated(self, x: Tensor) -> Tensor:  # [B, kv heads, T, d] → [B, heads, T, d], uncopied until attention needs it
        return x.unsqueeze(2).expand(-1, -1, self.num_heads // self.num_kv_heads, -1, -1).flatten(1, 2)


@dataclass(frozen=True)
class _Lora:
    """Which linear layers are adapted, and how."""

    modules: tuple[str, ...]
    mlp: bool
    output: bool
    quantize_base: bool
    arguments: dict[str, Any]  # of every adapted layer: rank, alpha, dropout
    use_dora: bool

    def linear(self, name: str, in_dim: int, out_dim: int) -> nn.Module:
        adapted = self.output if name == "output" else name in self.modules
        if not adapted:
            return nn.Linear(in_dim, out_dim, bias=False)
        # As in torchtune's builders, the output head is never quantized.
        quantize = {"quantize_base": self.quantize_base and name != "output"}
        return (DoRALinear if self.use_dora else LoRALinear)(in_dim, out_dim, **self.arguments, **quantize)

    def feed_forward(self, dim: int, hidden_dim: int) -> nn.Module:
        if not self.mlp:
            return qwen2_mlp(dim=dim, hidden_dim=hidden_dim)
        names = {"lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
        arguments = {theirs: self.arguments[ours] for theirs, ours in names.items()}
        return lora_qwen2_mlp(
            dim=dim, hidden_dim=hidden_dim, **arguments, use_dora=self.use_dora, quantize_base=self.quantize_base
        )


_NO_LORA = _Lora((), mlp=False, output=False, quantize_base=False, arguments={}, use_dora=False)


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
    """Arguments as torchtune's ``qwen2``, and ``head_dim``."""
    return _decoder(
        _NO_LORA,
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
    )


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
    """Arguments as torchtune's ``lora_qwen2``, and ``head_dim``.

    Raises:
        InputError: ``lora_attn_modules`` names no attention layer or an unknown one, or a tied head would be adapted.
    """
    unknown = set(lora_attn_modules) - set(ATTENTION_MODULES)
    if unknown or not lora_attn_modules:
        named = f"has {', '.join(sorted(unknown))}" if unknown else "is empty"
        raise InputError(f"model.lora_attn_modules {named}; choose one or more of {', '.join(ATTENTION_MODULES)}")
    if tie_word_embeddings and apply_lora_to_output:
        raise InputError(
            "model.apply_lora_to_output=True, and this model's output head is its embedding (tied), which takes no adapter; "
            "set model.apply_lora_to_output=False"
        )
    arguments = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout}
    lora = _Lora(tuple(lora_attn_modules), apply_lora_to_mlp, apply_lora_to_output, quantize_base, arguments, use_dora=use_dora)
    model = _decoder(
        lora,
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
    )
    if quantize_base:
        # As torchtune's builders do: state dicts hold the weights in full precision.
        dtype = model.tok_embeddings.weight.dtype
        hook = partial(reparametrize_as_dtype_state_dict_post_hook, dtype=dtype, offload_to_cpu=True)
        model._register_state_dict_hook(hook)
    return model


def _decoder(
    lora: _Lora,
    *,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    intermediate_dim: int,
    norm_eps: float,
    rope_base: float,
    tie_word_embeddings: bool,
    **attention: Any,
) -> TransformerDecoder:
    # One for all layers: its table of angles is max_seq_len · head_dim · 8 bytes.
    rope = Qwen2RotaryPositionalEmbeddings(attention["head_dim"], max_seq_len=attention["max_seq_len"], base=rope_base)
    layers = [
        TransformerSelfAttentionLayer(
            attn=_attention(lora, embed_dim, rope, norm_eps, **attention),
            mlp=lora.feed_forward(embed_dim, intermediate_dim),
            sa_norm=RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=RMSNorm(embed_dim, eps=norm_eps),
        )
        for _ in range(num_layers)
    ]
    embeddings = nn.Embedding(vocab_size, embed_dim)
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=nn.ModuleList(layers),
        max_seq_len=attention["max_seq_len"],
        num_heads=attention["num_heads"],
        head_dim=attention["head_dim"],
        norm=RMSNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(embeddings) if tie_word_embeddings else lora.linear("output", embed_dim, vocab_size),
    )


def _attention(
    lora: _Lora,
    embed_dim: int,
    rope: nn.Module,
    norm_eps: float,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    attn_dropout: float,
) -> Qwen3Attention:
    return Qwen3Attention(
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_proj=lora.linear("q_proj", embed_dim, num_heads * head_dim),
        k_proj=lora.linear("k_proj", embed_dim, num_kv_heads * head_dim),
        v_proj=lora.linear("v_proj", embed_dim, num_kv_heads * head_dim),
        output_proj=lora.linear("output_proj", num_heads * head_dim, embed_dim),
        pos_embeddings=rope,
        q_norm=RMSNorm(head_dim, eps=norm_eps),
        k_norm=RMSNorm(head_dim, eps=norm_eps),
        max_seq_len=max_seq_len,
        attn_dropout=attn_dropout,
    )


# ------------------------------------------------------------------------------------------- the sizes on the Hub


def _sizes(layers: int, heads: int, width: int, intermediate: int, *, tied: bool) -> dict[str, Any]:
    """Those in which the models differ; all have 8 key heads, heads of 128, and positions up to 40,960."""
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
