"""Attend over packed trees: several conversations in one row, each stretch of text that they share standing there once.

The tokens of a row are in depth-first order, so that the subtree of token k is the columns k to ``ends[k]``, and

    query q sees key k   where   k ≤ q < ends[k]        (k is q itself or one of its ancestors).

A row of ten thousand tokens is mostly pairs that do not see each other. On CUDA flex attention skips them in blocks of 128²;
elsewhere queries go through scaled_dot_product_attention a block at a time, with the keys that some query of the block sees.
"""

from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torchtune.modules import MultiHeadAttention, TransformerDecoder

from pidistill.errors import InputError
from pidistill.models.modules import attention_modules

FLEX_BLOCK = 128
# More: fewer, larger kernels; less: fewer keys that only other queries of the block see. 256 measured best on two cores.
_QUERY_BLOCK = 256


@dataclass(frozen=True)
class _Block:
    """Hold consecutive queries, the keys that they see, and who sees which: ``bias`` [queries, keys] is 0 or −inf."""

    queries: slice
    keys: slice | Int[Tensor, " K"]
    bias: Float[Tensor, "Q K"]


class TreeMask:
    """Mask a packed row; torchtune's decoder takes it as ``mask``; see :func:`read_trees`."""

    def __init__(self, ends: Int[Tensor, " L"]) -> None:
        self.ends = ends

    def dense(self) -> Bool[Tensor, "L L"]:
        """Return [query, key], True where the query sees the key: the definition, for tests."""
        columns = torch.arange(len(self.ends), device=self.ends.device)
        return (columns <= columns[:, None]) & (columns[:, None] < self.ends)

    @cached_property
    def blocks(self) -> list[_Block]:
        columns = torch.arange(len(self.ends), device=self.ends.device)
        return [self._block(columns, queries) for queries in columns.split(_QUERY_BLOCK)]

    def _block(self, columns: Int[Tensor, " L"], queries: Int[Tensor, " Q"]) -> _Block:
        first, stop = int(queries[0]), int(queries[-1]) + 1
        keys = columns[:stop][self.ends[:stop] > first]
        hidden = (keys > queries[:, None]) | (queries[:, None] >= self.ends[keys])
        bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
        # The prompts at the start of a row are one stretch: a view of keys and values instead of a copy.
        in_one = len(keys) == stop - int(keys[0])
        return _Block(slice(first, stop), slice(int(keys[0]), stop) if in_one else keys, bias)

    @cached_property
    def block_mask(self) -> BlockMask:
        """Return the same for flex attention. The row's length must be a multiple of FLEX_BLOCK."""
        ends = self.ends
        starts = torch.arange(0, len(ends), FLEX_BLOCK, device=ends.device)
        last_end, first_end = (f(ends.view(-1, FLEX_BLOCK), dim=1) for f in (torch.amax, torch.amin))
        before = starts < starts[:, None]  # [query block, key block]
        # Among earlier keys, those whose subtree reaches into the query block, and past its end: k ≤ q holds for all of them.
        full = before & (first_end >= starts[:, None] + FLEX_BLOCK)
        partly = ((before & (last_end > starts[:, None])) | (starts == starts[:, None])) & ~full
        # A lambda: the compiler that reads it takes no type-checked function.
        visible = lambda b, h, q, k: (k <= q) & (q < ends[k])  # noqa: E731
        return BlockMask.from_kv_blocks(*_ordered(partly), *_ordered(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible)


def _ordered(chosen: Bool[Tensor, "Q K"]) -> tuple[Int[Tensor, "1 1 Q"], Int[Tensor, "1 1 Q K"]]:
    """Return, per query block, how many key blocks are chosen, and their indices in front."""
    indices = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int()[None, None], indices.int().contiguous()[None, None]


# ------------------------------------------------------------------------------------------------- in a torchtune model


def read_trees(model: TransformerDecoder) -> None:
    """Let the model's attention modules take a :class:`TreeMask`, from now on; other masks go where they went before.

    The change stays after the forward: activation checkpointing calls the layers again in the backward.
    """
    check_trees(model)
    for module in attention_modules(model):
        if not _reads_trees(module):
            module._attention_call = partial(_attend, module._attention_call)


def check_trees(model: TransformerDecoder) -> None:
    """Refuse a model whose attention cannot take a :class:`TreeMask`."""
    for module in attention_modules(model):
        if not isinstance(module, MultiHeadAttention) or getattr(module, "sliding_window_size", None) is not None:
            raise InputError(
                f"{type(module).__name__} attends in a way that packed trees do not know (a sliding window, or its own kind of "
                "mask); set packing: padded"
            )
        if module.attn_dropout > 0:
            raise InputError(
                f"packed trees have no attention dropout, and the model has {module.attn_dropout}; set model.attn_dropout=0, "
                "or packing: padded"
            )


def _reads_trees(module: nn.Module) -> bool:
    call = getattr(module, "_attention_call", None)
    return isinstance(call, partial) and call.func is _attend


def _attend(otherwise: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout_p: float, is_causal: bool) -> Tensor:
    if isinstance(mask, TreeMask):
        return tree_attention(q, k, v, mask)
    return otherwise(q, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal)


@torch.compiler.disable
def tree_attention(
    q: Float[Tensor, "1 heads L d"], k: Float[Tensor, "1 heads L d"], v: Float[Tensor, "1 heads L d"], mask: TreeMask
) -> Float[Tensor, "1 heads L d"]:
    """Return softmax(q·kᵀ/√d over the keys that each query sees)·v, differentiable in all three."""
    if q.device.type == "cuda":
        return _compiled_flex_attention()(q, k, v, block_mask=mask.block_mask)
    return _BlockwiseAttention.apply(q, k, v, mask)


@cache
def _compiled_flex_attention() -> Any:
    # Every batch has another length; torchtune's own compilation is static and would take seconds at each.
    return torch.compile(flex_attention, dynamic=True)


class _BlockwiseAttention(torch.autograd.Function):
    """Call SDPA once per block of queries, and again in the backward.

    Left to autograd, every block would keep its copy of the keys and values, and its gradient would be a zero-filled copy of
    the whole row.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.mask = mask
        out = torch.empty_like(q)
        for block in mask.blocks:
            out[:, :, block.queries] = _attend_block(block, *_cut(block, q, k, v))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in ctx.mask.blocks:
            cut = [x.detach().requires_grad_() for x in _cut(block, q, k, v)]
            with torch.enable_grad():
                out = _attend_block(block, *cut)
            dq, dk, dv = torch.autograd.grad(out, cut, grad[:, :, block.queries])
            grad_q[:, :, block.queries] = dq
            for whole, part in ((grad_k, dk), (grad_v, dv)):
                if isinstance(block.keys, slice):
                    whole[:, :, block.keys] += part
                else:
                    whole.index_add_(2, block.keys, part)
        return grad_q, grad_k, grad_v, None


def _cut(block: _Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q[:, :, block.queries], k[:, :, block.keys], v[:, :, block.keys]


def _attend_block(block: _Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=block.bias.to(q.dtype))
