"""Sample from a decoder that takes layer masks (transformers') with caches of a length per row, and states.

A layer of attention writes into the cache of its module, in the middle of transformers' own forward. A layer that carries a
state (linear attention) finds a row per slot in :class:`States`, which stands where transformers expects its cache. A state has
no padding: rows of several tokens are then read with those of exactly their length.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pidistill.models.layer_masks import AttentionForm, LayerMask, PaddedMask, Rule, attend
from pidistill.models.protocol import Decoder, carried_state
from pidistill.rollouts.decoding import Cache, Context, Step, of_like_length, unembedding


class HFContext(Context):
    """Hold what the model has read, as the sampler's context; caches are made as attention modules are met."""

    def __init__(self, model: Decoder, max_columns: int, pad_id: int) -> None:
        super().__init__(model, [], pad_id, needs_mask=False)
        self._max_columns, self._slots = max_columns, 0
        self._cache_of: dict[nn.Module, Cache] = {}
        self.states = States() if carried_state(model) else None

    def reserve(self, slots: int) -> None:
        self._slots = slots
        super().reserve(slots)
        if self.states is not None:
            self.states.reserve(slots)

    def cache_of(self, module: nn.Module, step: Step) -> Cache:
        cache = self._cache_of.get(module)
        if cache is None:
            cache = self._cache_of[module] = Cache(self._max_columns)
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
    """Make the masks of one forward through the caches."""

    def __init__(self, context: HFContext, step: Step) -> None:
        self._context, self._step = context, step
        self.states = context.states

    def layer_mask(self, rule: Rule, positions: Int[Tensor, "n s"]) -> LayerMask:
        return _CachedMask(rule, self._context, self._step)


class _CachedMask(LayerMask):
    """Write keys and values into the caches, and attend to what they hold of each row."""

    def __init__(self, rule: Rule, context: HFContext, step: Step) -> None:
        super().__init__(rule)
        self._context, self._step = context, step
        self._prompts = PaddedMask(rule, step.columns.shape[1], step.columns.device) if step.copies is not None else None
        self._visible = step.mask if rule is None else self._in_window()

    def _in_window(self) -> Bool[Tensor, "n s end"]:
        keys = torch.arange(self._step.end, device=self._step.columns.device)
        allowed = self.allowed(self._step.columns, keys.expand(len(self._step.columns), -1))
        return allowed if self._step.mask is None else allowed & self._step.mask

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        cache = self._context.cache_of(module, self._step)
        keys, values = cache.update(k, v)
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


class States:
    """Stand for transformers' cache in the layers that carry a state: a row per slot, of those of one forward.

    Layers of attention ask it nothing but to pass keys and values through.
    """

    is_sliding = is_linear = is_dummy = ()
    is_compileable = False

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int, int], Float[Tensor, "slots ..."]] = {}
        self._given: dict[tuple[str, int, int], Tensor] = {}
        self._room = 0
        self._step: Step | None = None

    def reserve(self, slots: int) -> None:
        self._room = max(slots, self._room)

    @contextmanager
    def of(self, step: Step) -> Iterator[None]:
        """Serve as the states of the rows of one forward; prompts start from empty states.

        At its end, keep what layers have written into the states that they were given (one-token updates).
        """
        self._step, self._given = step, {}
        yield
        for key, state in self._given.items():
            self._put(key, state)

    def rearrange(self, order: Int[Tensor, " m"]) -> None:
        for kept in self._kept.values():
            kept[: len(order)] = kept[order]

    def _get(self, *key: Any) -> Tensor:
        return self._kept[key][self._step.slots]

    def _give(self, *key: Any) -> Tensor | None:
        if self._step.copies is not None:
            return None
        self._given[key] = self._get(*key)
        return self._given[key]

    def _put(self, key: tuple[str, int, int], new: Tensor) -> None:
        kept = self._kept.get(key)
        if kept is None or len(kept) < self._room:
            grown = new.new_zeros(self._room, *new.shape[1:])
            if kept is not None:
                grown[: len(kept)] = kept
            kept = self._kept[key] = grown
        if self._step.copies is None:
            kept[self._step.slots] = new
        else:
            slots, rows = self._step.copies
            kept[slots] = new[rows]

    # ------------------------------------------------------------------------------------------ what layers call

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._give("conv", layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._give("recurrent", layer_idx, state_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        key, fresh = ("conv", layer_idx, state_idx), self._step.copies is not None
        whole = conv_states if fresh else torch.cat([self._get(*key), conv_states], -1)
        self._given.pop(key, None)
        padded = F.pad(whole, (max(0, conv_kernel_size - whole.shape[-1]), 0))
        self._put(key, padded[..., -conv_kernel_size:])
        return padded if fresh else whole

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self._given.pop(("recurrent", layer_idx, state_idx), None)
        self._put(("recurrent", layer_idx, state_idx), recurrent_states)
        return recurrent_states

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return self._step.copies is None

    def is_recording_past(self, *_: Any) -> bool:
        return False

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return query_length, 0


@contextmanager
def layer_mask_decoding(model: Decoder, max_columns: int, pad_id: int) -> Iterator[HFContext]:
    """Give the model the sampler's head, and remove it afterwards, also after an exception."""
    context = HFContext(model, max_columns, pad_id)
    with unembedding(model, context.unembed):
        yield context
