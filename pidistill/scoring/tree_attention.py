"""Attend over packed trees: several conversations in one row, each stretch of text that they share standing there once.

The tokens of a row are in depth-first order, so that the subtree of token k is the columns k to ``ends[k]``, and

    query q sees key k   where   k ≤ q < ends[k]        (k is q itself or one of its ancestors).

A row of ten thousand tokens is mostly pairs that do not see each other. On CUDA flex attention skips them in blocks of 128²;
elsewhere queries go through scaled_dot_product_attention a block at a time, with the keys that some query of the block sees.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torchtune.modules import MultiHeadAttention

from pidistill.errors import InputError, one_line
from pidistill.models.layer_masks import AttentionForm, LayerMask, Rule, attend
from pidistill.models.modules import attention_modules
from pidistill.models.protocol import Decoder, carried_state

FLEX_BLOCK = 128
# More gives fewer and larger kernels; less gives fewer keys that only other queries of the block see. 256 is best on two cores.
_QUERY_BLOCK = 256
# Compiled variants of flex attention, of all models of a run together: two to four for each shape of heads, rule of a mask and
# form, as many again without gradient. torch's own limit is 8.
_FLEX_VARIANTS = 64


@dataclass(frozen=True)
class _Block:
    """Hold consecutive queries, the keys that some of them see, and who sees which."""

    queries: slice
    keys: slice | Int[Tensor, " K"]
    visible: Bool[Tensor, "Q K"]


class TreeMask:
    """Mask a packed row; a decoder takes it as ``mask``; see :func:`read_trees`."""

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
        visible = (keys <= queries[:, None]) & (queries[:, None] < self.ends[keys])
        # The prompts at the start of a row are one stretch: a view of keys and values instead of a copy.
        in_one = len(keys) == stop - int(keys[0])
        return _Block(slice(first, stop), slice(int(keys[0]), stop) if in_one else keys, visible)

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

    def layer_mask(self, rule: Rule, positions: Int[Tensor, "1 L"]) -> "TreeLayerMask":
        """Return the mask of transformers' layers that have ``rule``, which counts positions along the path."""
        return TreeLayerMask(rule, self, positions[0])


class TreeLayerMask(LayerMask):
    """Let layers of transformers see what the tree and their own rule allow both."""

    def __init__(self, rule: Rule, mask: TreeMask, positions: Int[Tensor, " L"]) -> None:
        super().__init__(rule)
        self._mask, self._positions = mask, positions

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        return tree_attention(q, k, v, self, form)

    @cached_property
    def blocks(self) -> list[_Block]:
        if self.rule is None:
            return self._mask.blocks
        at = self._positions
        return [replace(b, visible=b.visible & self.allowed(at[b.queries], at[b.keys])) for b in self._mask.blocks]

    @cached_property
    def block_mask(self) -> BlockMask:
        if self.rule is None:
            return self._mask.block_mask
        rule, at, tree = self.rule, self._positions, self._mask.block_mask
        in_tree = tree.mask_mod
        visible = lambda b, h, q, k: in_tree(b, h, q, k) & rule(b, h, at[q], at[k])  # noqa: E731
        # A block of pairs that the tree allows may hold some that the rule does not: none is left out of the comparison.
        return create_block_mask(visible, None, None, len(at), len(at), device=at.device, BLOCK_SIZE=FLEX_BLOCK)


def _ordered(chosen: Bool[Tensor, "Q K"]) -> tuple[Int[Tensor, "1 1 Q"], Int[Tensor, "1 1 Q K"]]:
    """Return, per query block, how many key blocks are chosen, and their indices in front."""
    indices = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int()[None, None], indices.int().contiguous()[None, None]


# ------------------------------------------------------------------------------------------------- in a model


def read_trees(model: Decoder) -> None:
    """Let the model's attention modules take a :class:`TreeMask`, from now on; other masks go where they went before.

    The change stays after the forward: activation checkpointing calls the layers again in the backward. A decoder of its own
    kind takes a tree without a change.
    """
    check_trees(model)
    for module in attention_modules(model):
        if not _reads_trees(module):
            module._attention_call = partial(_attend, module._attention_call)


def check_trees(model: Decoder) -> None:
    """Refuse a model whose attention cannot take a :class:`TreeMask`."""
    if state := carried_state(model):
        raise InputError(f"the model has {state}, which do not know the branches of packed trees; set packing: padded")
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
    q: Float[Tensor, "1 heads L d"],
    k: Float[Tensor, "1 kv_heads L d"],
    v: Float[Tensor, "1 kv_heads L dv"],
    mask: "TreeMask | TreeLayerMask",
    form: AttentionForm | None = None,
) -> Float[Tensor, "1 heads L dv"]:
    """Return softmax(q·kᵀ/√d over the keys that each query sees)·v, differentiable in all and in the sinks of ``form``."""
    form = form or AttentionForm()
    if q.device.type == "cuda":
        return flex_tree_attention(_compiled_flex_attention(), q, k, v, mask.block_mask, form)
    return _BlockwiseAttention.apply(q, k, v, form.sinks, mask, form)


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """Return flex attention, compiled as a whole or not at all: what is left of it uncompiled makes all scores, [heads, L, L].

    Every batch has another length; torchtune's own compilation is static and would take seconds at each. Floats are constants
    all the same: torch does not compile the gradient of a cap that is a variable.
    """
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)

    def attend_compiled(*inputs: Any, **options: Any) -> Any:
        try:
            with torch._dynamo.config.patch(recompile_limit=_FLEX_VARIANTS, specialize_float=True):
                return compiled(*inputs, **options)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise InputError(
                f"torch {torch.__version__} could not compile flex attention for packed trees ({one_line(error, 300)}); set "
                "packing=padded"
            ) from error

    return attend_compiled


def flex_tree_attention(flex: Any, q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, form: AttentionForm) -> Tensor:
    """Attend with flex attention ``flex``; a sink takes its share of the softmax by what is known of the others' sum."""
    cap, options = form.softcap, {"block_mask": block_mask, "scale": form.scaling, "enable_gqa": q.shape[1] != k.shape[1]}
    if cap is not None:
        options["score_mod"] = lambda score, b, h, q_index, k_index: cap * torch.tanh(score / cap)
    if form.sinks is None:
        return flex(q, k, v, **options)
    out, log_sum = flex(q, k, v, return_lse=True, **options)
    return out * torch.sigmoid(log_sum - form.sinks.view(1, -1, 1))[..., None].to(out.dtype)


class _BlockwiseAttention(torch.autograd.Function):
    """Call SDPA once per block of queries, and again in the backward.

    Left to autograd, every block would keep its copy of the keys and values, and its gradient would be a zero-filled copy of
    the whole row.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: "TreeMask | TreeLayerMask", form: AttentionForm
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.mask, ctx.form = mask, form
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for block in mask.blocks:
            out[:, :, block.queries] = attend(*_cut(block, q, k, v), block.visible, form)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
        for block in ctx.mask.blocks:
            cut = [x.detach().requires_grad_() for x in _cut(block, q, k, v)]
            own = [] if sinks is None else [sinks.detach().requires_grad_()]
            with torch.enable_grad():
                out = attend(*cut, block.visible, replace(ctx.form, sinks=own[0] if own else None))
            dq, dk, dv, *of_sinks = torch.autograd.grad(out, cut + own, grad[:, :, block.queries])
            grad_q[:, :, block.queries] = dq
            for whole, part in ((grad_k, dk), (grad_v, dv)):
                if isinstance(block.keys, slice):
                    whole[:, :, block.keys] += part
                else:
                    whole.index_add_(2, block.keys, part)
            if of_sinks:
                grad_sinks += of_sinks[0]
        return grad_q, grad_k, grad_v, grad_sinks, None, None


def _cut(block: _Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q[:, :, block.queries], k[:, :, block.keys], v[:, :, block.keys]
