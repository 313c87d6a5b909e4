"""Sample from a decoder that takes layer masks (transformers') with caches of a length per row, and states.

A layer of attention writes into the cache of its module, in the middle of transformers' own forward; a module that attends
twice in a forward (DiffLlama) has two caches. A layer that carries a state (linear attention) finds a row per slot in
:class:`pidistill.models.layer_states.States`, which stands where transformers expects its cache. A state has no padding: rows
of several tokens are then read with those of exactly their length.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pidistill.models.layer_masks import AttentionForm, LayerMask, PaddedMask, Rule, attend
from pidistill.models.layer_states import States
from pidistill.models.protocol import Decoder, carried_state
from pidistill.rollouts.decoding import Cache, Context, Step, of_like_length, unembedding


class HFContext(Context):
    """Hold what the model has read, as the sampler's context; caches are made as attention modules are met."""

    def __init__(self, model: Decoder, max_columns: int, pad_id: int) -> None:
        super().__init__(model, [], pad_id, needs_mask=False)
        self._max_columns, self._slots = max_columns, 0
        self._cache_of: dict[tuple[nn.Module, int], Cache] = {}
        self.states = States() if carried_state(model) else None

    def reserve(self, slots: int) -> None:
        self._slots = slots
        super().reserve(slots)
        if self.states is not None:
            self.states.reserve(slots)

    def cache_of(self, module: nn.Module, call: int, step: Step) -> Cache:
        """Return the cache of the ``call``-th time, from 0 on, that ``module`` attends in a forward."""
        cache = self._cache_of.get((module, call))
        if cache is None:
            cache = self._cache_of[module, call] = Cache(self._max_columns)
            cache.slots = self._slots
            self._caches.append(cache)
        cache.step = step
        return cache

    def chunks(self, lengths: list[int]) -> list[list[int]]:
        chunks = of_like_length(lengths)
        if self.states is None:
            return chunks
        return [[i for i in chunk if lengths[i] == n] for chunk in chunks for n in sorted({lengths[i] for i in chunk})]

    def read(self, slots: Sequence[int], tokens: list[list[int]]) -> Float[Tensor, "n V"]:
        if self.states is None or len({len(ids) for ids in tokens}) == 1:
            return super().read(slots, tokens)
        logits: list[Any] = [None] * len(slots)
        for length in sorted({len(ids) for ids in tokens}):
            at = [i for i, ids in enumerate(tokens) if len(ids) == length]
            for i, row in zip(at, super().read([slots[i] for i in at], [tokens[i] for i in at]), strict=True):
                logits[i] = row
        return torch.stack(logits)

    def rearrange(self, order: list[int]) -> None:
        super().rearrange(order)
        if self.states is not None:
            self.states.rearrange(self._tensor(order))

    def _mask(self, step: Step) -> "_CachedMasks":
        return _CachedMasks(self, step)

    def _forward(self, tokens: list[Sequence[int]], step: Step) -> Float[Tensor, "n V"]:
        if self.states is None:
            return super()._forward(tokens, step)
        with self.states.of(step):
            return super()._forward(tokens, step)


class _CachedMasks:
    """Make the masks of one forward through the caches, and count how often each module has attended in it."""

    def __init__(self, context: HFContext, step: Step) -> None:
        self._context, self._step = context, step
        self._calls: Counter[nn.Module] = Counter()
        self.states = context.states

    def layer_mask(self, rule: Rule, positions: Int[Tensor, "n s"]) -> LayerMask:
        return _CachedMask(rule, self, self._step)

    def next_cache(self, module: nn.Module) -> Cache:
        self._calls[module] += 1
        return self._context.cache_of(module, self._calls[module] - 1, self._step)


class _CachedMask(LayerMask):
    """Write keys and values into the caches, and attend to what they hold of each row."""

    def __init__(self, rule: Rule, masks: _CachedMasks, step: Step) -> None:
        super().__init__(rule)
        self._masks, self._step = masks, step
        self._prompts = PaddedMask(rule, step.columns.shape[1], step.columns.device) if step.copies is not None else None
        self._visible = step.mask if rule is None else self._in_window()

    def _in_window(self) -> Bool[Tensor, "n s end"]:
        keys = torch.arange(self._step.end, device=self._step.columns.device)
        allowed = self.allowed(self._step.columns, keys.expand(len(self._step.columns), -1))
        return allowed if self._step.mask is None else allowed & self._step.mask

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        keys, values = self._masks.next_cache(module).update(k, v)
        if self._prompts is not None:  # a prompt attends only to itself
            return self._prompts.attend(module, q, k, v, form)
        visible = self._visible
        if not form.is_plain:
            return attend(q, keys, values, None if visible is None else visible[:, None], form)
        # A key head's query heads become more queries of it, so that nothing is repeated over the length of the cache.
        groups = q.shape[1] // k.shape[1]
        queries = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        if visible is not None:
            visible = visible[:, None, None].expand(-1, 1, groups, -1, -1).flatten(2, 3)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=form.scaling)
        return out.reshape(*q.shape[:3], v.shape[3])


@contextmanager
def layer_mask_decoding(model: Decoder, max_columns: int, pad_id: int) -> Iterator[HFContext]:
    """Give the model the sampler's head, and remove it afterwards, also after an exception."""
    context = HFContext(model, max_columns, pad_id)
    with unembedding(model, context.unembed):
        yield context
