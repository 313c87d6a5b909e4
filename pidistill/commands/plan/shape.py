"""Read from a decoder what the estimates need: parameters, widths, and the bytes that autograd keeps of one token.

Everything is read from the modules themselves, on the meta device.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pidistill.models.adapters import train_adapters_only
from pidistill.models.layer_masks import AttentionForm, LayerMask, Rule
from pidistill.models.layer_states import States
from pidistill.models.modules import attention_modules
from pidistill.models.nf4 import dequantizing_bytes, stored_bytes
from pidistill.models.precision import add_up_norms_in_fp32
from pidistill.models.protocol import Decoder, carried_state, head_module, takes_layer_masks


@dataclass(frozen=True)
class ModelShape:
    """Hold what a decoder costs, in parameters, widths and bytes."""

    parameters: int  # elements; a tied head counts once
    trained: int  # elements of those that are trained
    weights_bytes: float  # parameters as they are stored; less than parameters · item_bytes where some have 4 bits
    dequantizing_bytes: float  # what a forward needs to make its largest 4-bit matrix whole
    buffers_bytes: int  # positional caches
    maps: int  # elements of the layers' matrices: 2 FLOPs each per token forward
    trained_maps: int  # elements of those that are trained
    head: int  # elements of the output matrix
    head_trained: bool  # gradient reaches the head
    tied: bool  # the head is the embedding
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    widest: int  # the most features that a layer computes at once, per token
    vocabulary: int
    saved_bytes: float  # what autograd keeps of all layers for one token, until its backward
    layer_saved_bytes: float  # what it keeps of the layer that keeps most
    kv_bytes: int  # keys and values of one token, of all layers that keep them while sampling
    state_bytes: int  # what layers keep of one row while sampling, whatever its length
    item_bytes: int  # bytes of one element in the run's dtype


def model_shape(model: Decoder) -> ModelShape:
    """Read a model that stands on the meta device; of one with LoRA adapters only these are trained, as in the recipes."""
    train_adapters_only(model)
    _shape_positions(model)
    heads, kv_heads, head_dim = _attention_sizes(model)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    embedding, head = model.tok_embeddings.weight, head_module(model).weight
    item_bytes = embedding.element_size()
    counted = _counted_in_forward(model) if takes_layer_masks(model) else _counted_by_layer(model)
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        weights_bytes=sum(stored_bytes(p, item_bytes) for p in model.parameters()),
        dequantizing_bytes=max(dequantizing_bytes(p, item_bytes) for p in model.parameters()),
        buffers_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        maps=_maps(model, model.layers.parameters()),
        trained_maps=_maps(model, (p for p in model.layers.parameters() if p.requires_grad)),
        head=head.numel(),
        head_trained=head.requires_grad,
        tied=head is embedding,
        layers=len(model.layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        width=embedding.shape[1],
        widest=max(p.shape[0] for p in matrices),
        vocabulary=embedding.shape[0],
        saved_bytes=sum(counted.saved),
        layer_saved_bytes=max(counted.saved),
        kv_bytes=counted.kv_elements * item_bytes,
        state_bytes=counted.state_bytes,
        item_bytes=item_bytes,
    )


def _attention_sizes(model: Decoder) -> tuple[int, int, int]:
    """Return heads, key heads and width of a head."""
    if hasattr(model, "attention_sizes"):
        return model.attention_sizes
    attention = attention_modules(model)[0]
    return attention.num_heads, attention.num_kv_heads, attention.head_dim


def _maps(model: Decoder, parameters: Iterable[Tensor]) -> int:
    """Return the elements of the matrices that a token goes through: of a mixture's experts the chosen ones."""
    chosen, experts = getattr(model, "experts", None) or (0, 1)
    return sum(p.numel() if p.ndim == 2 else p.numel() * chosen // experts for p in parameters if p.ndim in (2, 3))


@dataclass(frozen=True)
class _Counted:
    """Hold what was counted in forwards on the meta device."""

    saved: list[float]  # what autograd keeps of each layer, in bytes per token
    kv_elements: int  # of one token's keys and values, all layers
    state_bytes: int = 0  # of one row


def _counted_by_layer(model: Decoder) -> _Counted:
    """Count a decoder of torchtune's modules layer by layer."""
    add_up_norms_in_fp32(model)  # as a run's models do
    embedding = model.tok_embeddings.weight
    alike: dict[tuple, float] = {}  # by the shapes of their weights: most layers are like the first
    for layer in model.layers:
        if (key := _signature(layer)) not in alike:
            alike[key] = _saved_bytes(layer, embedding.shape[1], embedding.dtype)
    _, kv_heads, head_dim = _attention_sizes(model)
    return _Counted([alike[_signature(layer)] for layer in model.layers], 2 * len(model.layers) * kv_heads * head_dim)


def _shape_positions(model: Decoder) -> None:
    """Give Llama 3's scaled positions their table's shape: on the meta device they do not make it themselves."""
    for module in model.modules():
        if getattr(module, "is_cache_built", True) is False:
            table = torch.empty(module.max_seq_len, module.dim // 2, 2, dtype=torch.float32, device="meta")
            module.register_buffer("cache", table, persistent=False)
            module.is_cache_built = True


def _signature(layer: nn.Module) -> tuple:
    return tuple((name, p.shape, p.requires_grad) for name, p in layer.named_parameters())


class _FusedAttention(torch.autograd.Function):
    """Keep what flash and flex attention keep: queries, keys, values, the output and one fp32 number per head and query."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise RuntimeError("a layer on the meta device is only counted")


def _saved_bytes(layer: nn.Module, width: int, dtype: torch.dtype, tokens: int = 64) -> float:
    """Return the bytes per token that autograd keeps of one layer, counted in its forward on the meta device.

    Parameters and buffers are there anyway; a tensor that several operations keep is one.
    """
    own = {x.untyped_storage()._cdata for x in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            kept[x.untyped_storage()._cdata] = x
        return x

    x = torch.empty(1, tokens, width, device="meta", dtype=dtype, requires_grad=True)
    (attention,) = attention_modules(layer)
    stock, attention._attention_call = attention._attention_call, lambda q, k, v, **_: _FusedAttention.apply(q, k, v)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer(x, input_pos=torch.empty(1, tokens, device="meta", dtype=torch.long))
    attention._attention_call = stock
    return sum(x.untyped_storage().nbytes() for x in kept.values()) / tokens


class _CountedMask(LayerMask):
    """Let layers keep what fused attention keeps, and count the keys and values of each."""

    def __init__(self, states: "_CountedStates | None" = None) -> None:
        super().__init__(None)
        self.states, self.kv_elements = states, 0

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        self.kv_elements += (k.numel() + v.numel()) // (k.shape[0] * k.shape[2])
        groups = q.shape[1] // k.shape[1]
        return _FusedAttention.apply(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))

    def layer_mask(self, rule: Rule, positions: Tensor) -> LayerMask:
        return self


class _CountedStates(States):
    """Count the states that layers hand over after a prompt; none is kept."""

    def __init__(self) -> None:
        super().__init__()
        self._step = SimpleNamespace(copies=())  # of a forward over prompts
        self._bytes: dict[tuple[str, int, int], int] = {}

    @property
    def bytes_per_row(self) -> int:
        return sum(self._bytes.values())

    def _put(self, key: tuple[str, int, int], new: Tensor) -> None:
        self._bytes[key] = new[0].numel() * new.element_size()


def _counted_in_forward(model: Decoder, tokens: int = 64) -> _Counted:
    """Count a decoder whose layers cannot be called alone: by hooks in a forward of all of it."""
    # Tensors from the config are on the CPU; and the meta device knows the products of experts only in bf16.
    size, in_bf16 = model.tok_embeddings.weight.element_size(), getattr(model, "experts", None) is not None
    model.to("meta", torch.bfloat16 if in_bf16 else None)
    ids = torch.zeros(1, tokens, device="meta", dtype=torch.long)
    states = _CountedStates() if carried_state(model) else None
    if states is not None:
        with torch.no_grad():
            model(ids, mask=_CountedMask(states), input_pos=ids)
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept: list[dict[int, int]] = [{} for _ in model.layers]
    now: list[int] = []

    def keep(x: Tensor) -> Tensor:
        if now and x.untyped_storage()._cdata not in own:
            kept[now[-1]][x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    alive: list[Tensor] = []  # a freed storage's number would be given again
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: now.append(i))
        layer.register_forward_hook(lambda *_: now.clear())
    model.tok_embeddings.weight.requires_grad_(True)  # so that gradient goes through every layer
    mask = _CountedMask()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(ids, mask=mask, input_pos=ids)
    saved = [sum(one.values()) * (size / 2 if in_bf16 else 1) / tokens for one in kept]
    return _Counted(saved, mask.kv_elements, states.bytes_per_row if states else 0)
