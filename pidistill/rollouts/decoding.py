"""A torchtune decoder while it samples: growing KV caches, a head for the last position only, gathered FSDP2 parameters.

Everything is put on the instance for the duration and taken away again; torchtune's classes stay as they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtune.modules import TransformerDecoder

from pidistill.errors import InputError


class _GrowingKVCache(nn.Module):
    """Keys and values of the columns read so far: what a torchtune attention module calls its ``kv_cache``.

    Stock caches hand the attention their whole allocated length in every step; this one hands out what is filled.
    A Module because torch accepts nothing else under a name that once held one (a model that `generate` has used); its tensors
    are no buffers, so no state dict sees them.
    """

    def __init__(self, max_columns: int) -> None:
        super().__init__()
        self.length = 0
        self._max_columns = max_columns
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def update(self, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, heads, s, d] and return everything so far, [B, heads, length, d]."""
        end = self.length + k_val.shape[2]
        if self._k is None or end > self._k.shape[2]:
            capacity = min(self._max_columns, end + max(64, end // 4))
            self._k, self._v = (self._grown(old, new, capacity) for old, new in ((self._k, k_val), (self._v, v_val)))
        self._k[:, :, self.length : end] = k_val
        self._v[:, :, self.length : end] = v_val
        self.length = end
        return self._k[:, :, :end], self._v[:, :, :end]

    def _grown(self, old: Tensor | None, new: Tensor, capacity: int) -> Tensor:
        grown = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
        if old is not None:
            grown[:, :, : self.length] = old[:, :, : self.length]
        return grown

    def select(self, rows: Int[Tensor, " B"]) -> None:
        self._k, self._v = self._k[rows], self._v[rows]


class Context:
    """What the model has read in this batch: one cache per layer, and how far each row is padded on the left."""

    def __init__(self, model: TransformerDecoder, caches: list[_GrowingKVCache]) -> None:
        self._model = model
        self._caches = caches
        self._device = next(model.parameters()).device

    def tensor(self, values: list) -> Int[Tensor, "..."]:
        return torch.tensor(values, dtype=torch.long, device=self._device)

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """Keep the given rows, in this order; a row may be taken several times."""
        for cache in self._caches:
            cache.select(rows)
        self._padding = self._padding[rows]

    def read_prompts(self, prompts: list[Sequence[int]], pad_id: int) -> Float[Tensor, "B V"]:
        """Start the batch; the logits of each prompt's next token."""
        longest = max(len(prompt) for prompt in prompts)
        self._padding = self.tensor([longest - len(prompt) for prompt in prompts])
        padded = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        return self.read(padded, list(range(len(prompts))))

    def read(self, tokens: list[list[int]], due: list[int]) -> Float[Tensor, "N V"]:
        """Feed the next columns of every row; the fp32 logits of the next token of the rows that are ``due``."""
        start = self._caches[0].length
        end = start + len(tokens[0])
        self._due = self.tensor(due)
        positions = (torch.arange(start, end, device=self._device) - self._padding[:, None]).clamp(min=0)
        mask = attention_mask(self._padding, start, end)
        return self._model(self.tensor(tokens), mask=mask, input_pos=positions)[:, 0]

    def unembed(self, h: Float[Tensor, "B s H"]) -> Float[Tensor, "N 1 V"]:
        """In place of the model's own: only the last position, and only of the rows that sample now, reaches the head."""
        return self._model.output(self._model.norm(h[self._due, -1:])).float()


def attention_mask(padding: Int[Tensor, " B"], start: int, end: int) -> Bool[Tensor, "B s end"]:
    """True where the queries at columns ``start`` to ``end`` may look: the row's own columns up to the query's.

    A query on padding looks at itself: a softmax over nothing is NaN, and 0 · NaN would reach the other columns through the
    cached values.
    """
    columns = torch.arange(end, device=padding.device)
    queries = columns[start:, None]
    return ((columns <= queries) & (columns >= padding[:, None, None])) | (columns == queries)


@contextmanager
def decoding(model: TransformerDecoder, max_columns: int) -> Iterator[Context]:
    """Give the model caches and the sampler's head, and take them away again whatever happens.

    Caches left behind would make every later forward without a mask attend in both directions, silently.
    """
    attentions = [m for m in model.modules() if hasattr(m, "kv_cache") and hasattr(m, "cache_enabled")]
    _check_attentions(attentions, max_columns)
    caches = [_GrowingKVCache(max_columns) for _ in attentions]
    context = Context(model, caches)
    try:
        for attention, cache in zip(attentions, caches, strict=True):
            attention.kv_cache, attention.cache_enabled = cache, True
        model.unembed = context.unembed  # shadows the method on this instance; torchtune stays as it is
        yield context
    finally:
        for attention in attentions:
            attention.kv_cache, attention.cache_enabled = None, False
        model.__dict__.pop("unembed", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, each module's own mode restored; compiled layers run eagerly, or every new length would compile again."""
    training = [module for module in model.modules() if module.training]
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    with ExitStack() as stack:
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Hold all parameters of an FSDP2 model in full, so that forwards inside need no communication.

    Otherwise every forward is a collective, and ranks that sample different numbers of steps wait for each other for ever.
    Entering is a collective: every rank enters, and does so between training steps. Each rank needs the memory of
    the whole model. On leaving, also by an exception, the parameters are sharded again and each module's
    ``reshard_after_forward`` is what it was. Does nothing for a model that is not sharded.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules for group in _parameter_groups(module)]
    resharding = [group.post_forward_mesh_info for group in groups]
    try:
        for module in modules:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        # The flag has no public getter, and the public setter knows neither group sizes nor None.
        for group, mesh in zip(groups, resharding, strict=True):
            group.post_forward_mesh_info = mesh
        for module in modules:
            module.reshard()


def _parameter_groups(module: FSDPModule) -> list:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = state._fsdp_param_group  # older torch: one group or None
    return [] if group is None else [group]


def _check_attentions(attentions: list[nn.Module], max_columns: int) -> None:
    if any(attention.kv_cache is not None for attention in attentions):
        raise InputError(
            "the model already has KV caches of its own (setup_caches was called); remove them with "
            "torchtune.modules.common_utils.delete_kv_caches before sampling"
        )
    for attention in attentions:
        window = getattr(attention, "sliding_window_size", None)
        if window is not None and window < max_columns:
            # torchtune's window is counted from the first column of the cache, which is right only while all fits in it.
            raise InputError(
                f"longest prompt + sampler.max_new_tokens is {max_columns} tokens, above the model's sliding window of "
                f"{window}, where torchtune's attention is wrong with a KV cache; lower sampler.max_new_tokens"
            )
