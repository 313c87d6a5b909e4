"""Compute attention of Qwen3 (arXiv 2505.09388): RMS norms over the head width of queries and keys, before the rotation.

torchtune's MultiHeadAttention would rotate first and norm then. With norm weights of one the two agree, since a rotation keeps
lengths; with trained weights they do not.
"""

from typing import Any

from torch import Tensor
from torchtune.modules import MultiHeadAttention


class Qwen3Attention(MultiHeadAttention):
    """Norm before the rotation in torchtune's attention; ``_attention_call`` and ``kv_cache`` are used as there."""

    def forward(self, x: Tensor, y: Tensor | None = None, *, mask: Any = None, input_pos: Tensor | None = None) -> Tensor:
        """Return [B, T, D] of x and y [B, T, D], which are the same, as it is self-attention."""
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
