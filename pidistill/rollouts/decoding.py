"""Hold what a decoder needs while it samples: KV caches with a length per row, a head for the last token, gathered parameters.

Everything is set on the instance while it samples and removed afterwards; torchtune's classes stay as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from pidistill.errors import InputError
from pidistill.models.modules import attention_modules
from pidistill.models.precision import multiply_head, own_wide_head, parameter_groups, widen_head
from pidistill.models.protocol import Decoder, logit_cap, takes_layer_masks
from pidistill.tokenizers.prefix import common_prefix_length

# Prompts are read in forwards of at most this many tokens, padding included: more is no faster, and costs memory.
TOKENS_PER_READ = 8192

# What all prompts begin with is read once, by itself, where that saves this many tokens: a forward more has its price too.
SAVED_BY_PREFIX = 512


@dataclass(frozen=True)
class Step:
    """Hold where one forward reads and writes; the same in every layer."""

    slots: Int[Tensor, " n"]  # [n] the cache row of each row of the forward
    contiguous: bool  # the slots are 0 to n - 1
    starts: Int[Tensor, " n"]  # [n] how many columns each row holds already
    start: int | None  # their common value; None where they differ
    end: int  # the number of columns that are attended
    mask: Bool[Tensor, "n s end"] | None  # [n, s, end] True where a query may look; None where it may look at all of them
    columns: Int[Tensor, "n s"]  # [n, s] where each row writes
    # Where prompts are read, (slots, rows of the forward): which rows' keys and values go where. A prompt attends to itself
    # alone. None afterwards.
    copies: tuple[Int[Tensor, " R"], Int[Tensor, " R"]] | None = None

    @cached_property
    def masks(self) -> dict[int, Bool[Tensor, "n 1 q end"]]:
        """Return the mask for queries of so many heads in a row, made for the first layer and used in all."""
        return {}

    def mask_of(self, repeats: int) -> Bool[Tensor, "n 1 q end"] | None:
        if self.mask is not None and repeats not in self.masks:
            self.masks[repeats] = self.mask[:, None, None].expand(-1, 1, repeats, -1, -1).flatten(2, 3)
        return self.masks.get(repeats)


def grown_columns(needed: int, most: int) -> int:
    """Return the columns of a cache that has just grown to hold ``needed``: a quarter more, at least 64 more.

    It gets no more than ``most``, the longest row that the sampler may reach.
    """
    return max(needed, min(most, needed + max(64, needed // 4)))


class Cache(nn.Module):
    """Hold keys and values of one layer, [slots, kv heads, columns, head dim]; each row fills its own columns from 0 on.

    A Module because torch accepts nothing else as ``kv_cache`` of a model that once had one (`generate` has used it); its
    tensors are no buffers, so no state dict sees them.
    """

    def __init__(self, max_columns: int) -> None:
        super().__init__()
        self._max_columns = max_columns
        self.step: Step | None = None
        self.slots = 0  # how many the next growth makes room for
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, kv_heads: int, **_) -> Tensor:
        """Replace a torchtune attention's ``_attention_call``: q, k, v [n, heads, s, d], keys repeated per query head."""
        repeats = q.shape[1] // kv_heads
        self._write(k[:, ::repeats], v[:, ::repeats])
        if self.step.copies is not None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # A key head's query heads become more queries of it, so that nothing is repeated over the length of the cache.
        queries = q.reshape(q.shape[0], kv_heads, -1, q.shape[3])
        mask = self.step.mask_of(repeats)
        return F.scaled_dot_product_attention(queries, *self._read(), attn_mask=mask).reshape(q.shape)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append [n, heads, s, d] and return all, as torchtune's caches do, for an attention without ``_attention_call``."""
        self._write(k, v)
        return (k, v) if self.step.copies is not None else self._read()

    def move(self, source: Int[Tensor, " m"], target: Int[Tensor, " m"]) -> None:
        self._k[target], self._v[target] = self._k[source], self._v[source]

    def _read(self) -> tuple[Tensor, Tensor]:
        rows = slice(len(self.step.slots)) if self.step.contiguous else self.step.slots
        return self._k[rows, :, : self.step.end], self._v[rows, :, : self.step.end]

    def _write(self, k: Tensor, v: Tensor) -> None:
        step, s = self.step, k.shape[2]
        self._reserve(step.end, k, v)
        for stored, new in ((self._k, k), (self._v, v)):
            if step.copies is not None:
                slots, rows = step.copies
                stored[slots, :, :s] = new[rows]
            elif step.contiguous and step.start is not None:
                stored[: len(step.slots), :, step.start : step.end] = new
            else:
                stored[step.slots[:, None], :, step.columns] = new.transpose(1, 2)

    def _reserve(self, columns: int, k: Tensor, v: Tensor) -> None:
        if self._k is None or columns > self._k.shape[2]:
            wanted = grown_columns(columns, self._max_columns)
            self._k, self._v = self._grown(self._k, wanted, k), self._grown(self._v, wanted, v)

    def _grown(self, old: Tensor | None, columns: int, like: Tensor) -> Tensor:
        grown = like.new_empty(self.slots, like.shape[1], columns, like.shape[3])
        filled = 0 if old is None else old.shape[2]
        if old is not None:
            grown[:, :, :filled] = old[: self.slots]
        # Zeros, since memory may hold NaN: what a row may not see has weight 0 in its attention, and 0 · NaN is NaN.
        grown[:, :, filled:] = 0
        return grown


class Context:
    """Hold what the model has read: one cache per layer. Each row has a slot and its own length, and advances on its own."""

    def __init__(self, model: Decoder, caches: list[Cache], pad_id: int, *, needs_mask: bool) -> None:
        self._model = model
        self._caches = caches
        self._pad_id = pad_id
        self._needs_mask = needs_mask
        self._device = next(model.parameters()).device
        self._head = _wide_head(model)
        self._lengths: list[int] = []  # of the rows in slots 0, 1, …

    def reserve(self, slots: int) -> None:
        """Make room, from the next growth on, for this many rows."""
        for cache in self._caches:
            cache.slots = slots

    def read_prompts(self, prompts: list[Sequence[int]], prompt_of: list[int]) -> Float[Tensor, "P V"]:
        """Read each prompt once, and begin a row with ``prompts[prompt_of[i]]`` in each of the next slots.

        The same system message, tools and examples before every question are read once for all of them.

        Returns:
            fp32 logits of each prompt's next token.
        """
        shared = shared_beginning(prompts)
        if (len(prompts) - 1) * shared < SAVED_BY_PREFIX:
            return self._read_apart(prompts, prompt_of)
        first, logits = len(self._lengths), [None] * len(prompts)
        leaders = [first + prompt_of.index(prompt) for prompt in range(len(prompts))]
        self._read_apart([prompts[0][:shared]], [0] * len(prompt_of))
        rests = [prompt[shared:] for prompt in prompts]
        for chunk in self.chunks([len(rest) for rest in rests]):
            read = self.read([leaders[prompt] for prompt in chunk], [rests[prompt] for prompt in chunk])
            for prompt, row in zip(chunk, read, strict=True):
                logits[prompt] = row
        self.rearrange([*range(first), *(leaders[prompt] for prompt in prompt_of)])
        return torch.stack(logits)

    def _read_apart(self, prompts: list[Sequence[int]], prompt_of: list[int]) -> Float[Tensor, "P V"]:
        first, logits = len(self._lengths), [None] * len(prompts)
        self._lengths += [len(prompts[prompt]) for prompt in prompt_of]
        for chunk in self.chunks([len(prompt) for prompt in prompts]):
            place = {prompt: row for row, prompt in enumerate(chunk)}
            rows = [(first + i, place[prompt]) for i, prompt in enumerate(prompt_of) if prompt in place]
            slots, sources = (self._tensor(list(numbers)) for numbers in zip(*rows, strict=True))
            tokens = [prompts[prompt] for prompt in chunk]
            step = self._step(range(len(chunk)), [0] * len(chunk), max(map(len, tokens)), prompts=True)
            read = self._forward(tokens, replace(step, copies=(slots, sources)))
            for prompt, row in zip(chunk, read, strict=True):
                logits[prompt] = row
        return torch.stack(logits)

    def chunks(self, lengths: list[int]) -> list[list[int]]:
        """Return which prompts to read in one forward."""
        return of_like_length(lengths)

    def read(self, slots: Sequence[int], tokens: list[list[int]]) -> Float[Tensor, "n V"]:
        """Feed each of the rows in ``slots`` its next ids, of any number; the fp32 logits of each one's next token."""
        step = self._step(slots, [self._lengths[slot] for slot in slots], max(map(len, tokens)))
        for slot, ids in zip(slots, tokens, strict=True):
            self._lengths[slot] += len(ids)
        return self._forward(tokens, step)

    def rearrange(self, order: list[int]) -> None:
        """Put the row of slot ``order[i]`` into slot i; rows that are not in ``order`` are dropped."""
        moved = [(source, target) for target, source in enumerate(order) if source != target]
        self._lengths = [self._lengths[source] for source in order]
        if moved:
            source, target = (self._tensor(list(numbers)) for numbers in zip(*moved, strict=True))
            for cache in self._caches:
                cache.move(source, target)

    def unembed(self, h: Float[Tensor, "n s H"]) -> Float[Tensor, "n 1 V"]:
        """Unembed each row's last token only, in place of the model's own ``unembed``."""
        last = self._model.norm(h[torch.arange(len(h), device=self._device), self._last][:, None])
        if self._head is not None:
            logits = multiply_head(last[:, 0], self._head)[:, None]
        else:
            output = self._model.output
            logits = (F.linear(last, output.weight) if isinstance(output, nn.Embedding) else output(last)).float()
        cap = logit_cap(self._model)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _step(self, slots: Sequence[int], starts: list[int], s: int, *, prompts: bool = False) -> Step:
        start = starts[0] if min(starts) == max(starts) else None
        end, positions = max(starts) + s, self._tensor(starts)
        everything_seen = prompts or (s == 1 and start is not None)
        mask = attention_mask(positions, s, end) if self._needs_mask or not everything_seen else None
        columns = positions[:, None] + torch.arange(s, device=self._device)
        contiguous = list(slots) == list(range(len(slots)))
        return Step(self._tensor(list(slots)), contiguous, positions, start, end, mask, columns)

    def _forward(self, tokens: list[Sequence[int]], step: Step) -> Float[Tensor, "n V"]:
        """Read rows padded on the right: what a padding column writes is never seen, and the row's next ids replace it."""
        s = max(map(len, tokens))
        padded = self._tensor([[*ids, *[self._pad_id] * (s - len(ids))] for ids in tokens])
        self._last = self._tensor([len(ids) - 1 for ids in tokens])
        for cache in self._caches:
            cache.step = step
        return self._model(padded, mask=self._mask(step), input_pos=step.columns.clamp(max=self._model.max_seq_len - 1))[:, 0]

    def _mask(self, step: Step) -> Any:
        """Return what the model is given as ``mask``."""
        return step.mask

    def _tensor(self, values: list) -> Int[Tensor, "..."]:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def _wide_head(model: Decoder) -> Float[Tensor, "V H"] | None:
    """Return the weight to make fp32 logits with, where the model's own head would round them to bf16, and None elsewhere."""
    head = getattr(model.output, "tied_module", model.output)
    plain = isinstance(head, (nn.Linear, nn.Embedding)) and getattr(head, "bias", None) is None
    if not plain or head.weight.dtype != torch.bfloat16:
        return None
    own = own_wide_head(model, head)
    return widen_head(head.weight.detach()) if own is None else own


def shared_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, and at least one of each prompt is left."""
    most = min(map(len, prompts)) - 1
    return min(most, *(common_prefix_length(prompts[0], prompt) for prompt in prompts[1:])) if len(prompts) > 1 else most


def of_like_length(lengths: list[int]) -> list[list[int]]:
    """Return which rows to read in one forward: those of like length, so that padding is little and memory bounded."""
    chunks: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunks and (len(chunks[-1]) + 1) * lengths[i] <= TOKENS_PER_READ:
            chunks[-1].append(i)
        else:
            chunks.append([i])
    return chunks


def attention_mask(starts: Int[Tensor, " n"], s: int, end: int) -> Bool[Tensor, "n s end"]:
    """Return True where the query at place i of a row may look: the row's columns up to its own, ``starts + i``."""
    queries = starts[:, None] + torch.arange(s, device=starts.device)
    return torch.arange(end, device=starts.device) <= queries[..., None]


def decoding(model: Decoder, max_columns: int, pad_id: int) -> AbstractContextManager[Context]:
    """Give the model caches and the sampler's head, and take them away again, also after an exception."""
    if takes_layer_masks(model):
        from pidistill.rollouts.hf_decoding import layer_mask_decoding

        return layer_mask_decoding(model, max_columns, pad_id)
    return _torchtune_decoding(model, max_columns, pad_id)


@contextmanager
def unembedding(model: Decoder, unembed: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Shadow the method on this instance while it samples; the model's class stays as it is."""
    model.unembed = unembed
    try:
        # cuDNN plans a new kernel for every length, which takes longer (37 ms on an H200) than the rest of the step.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        model.__dict__.pop("unembed", None)


@contextmanager
def _torchtune_decoding(model: Decoder, max_columns: int, pad_id: int) -> Iterator[Context]:
    """Put a cache on every attention module.

    Caches left behind would make every later forward without a mask attend in both directions, silently.
    """
    attentions = attention_modules(model)
    _check_attentions(attentions, max_columns)
    caches = [Cache(max_columns) for _ in attentions]
    through_update = [m for m in attentions if "_attention_call" not in vars(m)]
    context = Context(model, caches, pad_id, needs_mask=bool(through_update))
    shadowed = [(m, vars(m)["_attention_call"]) for m in attentions if "_attention_call" in vars(m)]
    try:
        for attention, cache in zip(attentions, caches, strict=True):
            if attention in through_update:
                attention.kv_cache, attention.cache_enabled = cache, True
            else:
                attention._attention_call = partial(cache.attend, kv_heads=attention.num_kv_heads)
        with unembedding(model, context.unembed):
            yield context
    finally:
        for attention in through_update:
            attention.kv_cache, attention.cache_enabled = None, False
        for attention, call in shadowed:
            attention._attention_call = call


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode, and restore each module's own; compiled layers run eagerly, or each new length would compile again."""
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

    Otherwise every forward is a collective, and ranks that sample different numbers of steps wait for each other forever.
    Entering is a collective: every rank enters, and does so between training steps. Each rank needs the memory of
    the whole model; under tensor parallelism of its own share of the layers, and forwards still communicate among the ranks
    that share a model. On leaving, also by an exception, the parameters are sharded again and each module's
    ``reshard_after_forward`` is what it was. Does nothing for a model that is not sharded.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules for group in parameter_groups(module)]
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


def find_window(model: Decoder) -> int | None:
    """Return the shortest sliding window of torchtune's attention, beyond which it cannot sample; None without any."""
    attentions = [] if takes_layer_masks(model) else attention_modules(model)
    windows = (getattr(attention, "sliding_window_size", None) for attention in attentions)
    return min((window for window in windows if window is not None), default=None)


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
