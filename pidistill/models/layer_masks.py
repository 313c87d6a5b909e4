"""Attend as a decoder of transformers asks: who sees whom comes from an object that stands where its layers expect a mask.

transformers writes the rule of a layer (causal, a sliding window, chunks) as a function of two indices. The objects here
evaluate it on the *positions* of tokens, so that a window is right in padded rows, in packed trees, and in caches with a length
per row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pidistill.errors import InputError

# (batch, head, query index, key index) → whether the query sees the key; None is the causal rule.
Rule = Callable[[Any, Any, Tensor, Tensor], Tensor] | None


@dataclass(frozen=True)
class AttentionForm:
    """Say how a layer attends beside who sees whom."""

    scaling: float | None = None  # factor of the scores; None is 1/√d
    sinks: Float[Tensor, " heads"] | None = None  # [heads] a score that takes part in the softmax and has no value (gpt-oss)
    softcap: float | None = None  # c where scores are c·tanh(x / c) (Gemma 2)

    @property
    def is_plain(self) -> bool:
        return self.sinks is None and self.softcap is None


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, form: AttentionForm, *, causal: bool = False) -> Tensor:
    """Return softmax(scores of what is visible)·v, [B, heads, Q, dv].

    Args:
        q: [B, heads, Q, d]; ``k`` and ``v`` [B, key heads, K, …]. Plain annotations: compiled layers trace this function.
        visible: […, Q, K] bool, broadcast; None where all is visible.
        causal: token i sees those up to i, without ``visible``.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if form.is_plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, scale=form.scaling)
    if causal:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros((1, 1) if visible is None else visible.shape, device=q.device)
    if visible is not None:
        bias = bias.masked_fill(~visible, -torch.inf)
    if form.softcap is None:
        # A sink is one more key of zeros, whose score is the sink and whose value is nothing.
        shape = (*torch.broadcast_shapes(bias.shape[:-2], (q.shape[1],)), q.shape[2])
        bias = torch.cat([bias.expand(*shape, k.shape[2]), form.sinks.view(-1, 1, 1).expand(*shape, 1)], -1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=form.scaling)
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if form.scaling is None else form.scaling)
    scores = form.softcap * torch.tanh(scores / form.softcap) + bias
    if form.sinks is not None:
        sinks = form.sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores, v = torch.cat([scores, sinks], -1), F.pad(v, (0, 0, 0, 1))
    return torch.softmax(scores.float(), -1).to(v.dtype) @ v


class LayerMask:
    """Stand for a layer's ``attention_mask`` in transformers: one object for all layers with the same rule, per forward."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __getitem__(self, index: Any) -> "LayerMask":
        """Return itself where a layer asks for all of the mask (Gemma 4 takes the rows whose logits are wanted)."""
        if any(part not in (slice(None), slice(0, None)) for part in index):
            raise InputError("a layer asks for a part of its mask, which is not made here; choose another model")
        return self

    def allowed(self, queries: Int[Tensor, "... Q"], keys: Int[Tensor, "... K"]) -> Bool[Tensor, "... Q K"]:
        """Return what the rule allows between tokens at these positions."""
        queries, keys = queries[..., None], keys[..., None, :]
        return keys <= queries if self.rule is None else self.rule(torch.zeros_like(queries), 0, queries, keys)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        """Return the attention of ``module`` [B, heads, Q, d]; keys and values are those of the key heads."""
        raise NotImplementedError


class PaddedMask(LayerMask):
    """Read rows that are padded on the right: no token sees what stands behind it, so padding needs no mask."""

    def __init__(self, rule: Rule, length: int, device: torch.device) -> None:
        super().__init__(rule)
        columns = torch.arange(length, device=device)
        self._visible = None if rule is None else self.allowed(columns, columns)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        if self.rule is None:
            return attend(q, k, v, None, form, causal=True)
        return attend(q, k, v, self._visible, form)


class MakesLayerMasks(Protocol):
    """Make the masks of a forward: the packed row's TreeMask, and the sampler's caches."""

    def layer_mask(self, rule: Rule, positions: Int[Tensor, "B L"]) -> LayerMask:
        """Return the mask of the layers that have ``rule``."""
        ...
