"""What a run will take, before it runs: bytes per phase on each rank, and seconds per phase of a round.

    ModelShape (read from the modules, on the meta device) + Workload (lengths, groups, budget) + Setup (how it is trained)
      ─► memory   {phase: {part: bytes}}    the phase with the largest sum has to fit
      ─► seconds  {phase: seconds}          FLOPs and bytes of the phase over a device's rates

Every term is one line with its reason. All rollouts have the same lengths here. Not counted: communication between ranks, the
time of environment and reward, evaluation, `sft_weight`'s demonstrations, groups that are sampled again, a teacher's memory.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from pidistill.adapters import train_adapters_only
from pidistill.devices import Device
from pidistill.head import _BLOCK_ELEMENTS, _CHUNK_ELEMENTS
from pidistill.rollouts.decoding import _TOKENS_PER_READ
from pidistill.tree_attention import FLEX_BLOCK
from pidistill.types import ViewName

PHASES = ("rollout", "teacher", "forward", "head", "backward", "optimizer")

# ---------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class ModelShape:
    """What a decoder costs, in parameters, widths and bytes.

    Attributes:
        parameters, trained: numbers of elements; a tied head counts once.
        buffers_bytes: positional caches.
        maps, trained_maps: elements of the layers' matrices: 2 FLOPs each per token forward.
        head: elements of the output matrix.
        head_trained, tied: whether gradient reaches it, and whether it is the embedding.
        widest: the most features that a layer computes at once, per token.
        saved_bytes: what autograd keeps of all layers for one token, until its backward.
        layer_saved_bytes: the same of the layer that keeps most.
        item_bytes: of one element in the run's dtype.
    """

    parameters: int
    trained: int
    buffers_bytes: int
    maps: int
    trained_maps: int
    head: int
    head_trained: bool
    tied: bool
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    widest: int
    vocabulary: int
    saved_bytes: float
    layer_saved_bytes: float
    item_bytes: int


def model_shape(model: TransformerDecoder) -> ModelShape:
    """Read a model that stands on the meta device; of one with LoRA adapters these alone are trained, as in the recipes."""
    train_adapters_only(model)
    attention = model.layers[0].attn
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    embedding = model.tok_embeddings.weight
    head = getattr(model.output, "tied_module", model.output).weight
    alike: dict[tuple, float] = {}  # by the shapes of their weights: most layers are like the first
    for layer in model.layers:
        if (key := _signature(layer)) not in alike:
            alike[key] = _saved_bytes(layer, embedding.shape[1], embedding.dtype)
    saved = [alike[_signature(layer)] for layer in model.layers]
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        buffers_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        maps=sum(p.numel() for p in matrices),
        trained_maps=sum(p.numel() for p in matrices if p.requires_grad),
        head=head.numel(),
        head_trained=head.requires_grad,
        tied=head is embedding,
        layers=len(model.layers),
        heads=attention.num_heads,
        kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        width=embedding.shape[1],
        widest=max(p.shape[0] for p in matrices),
        vocabulary=embedding.shape[0],
        saved_bytes=sum(saved),
        layer_saved_bytes=max(saved),
        item_bytes=embedding.element_size(),
    )


def _signature(layer: nn.Module) -> tuple:
    return tuple((name, p.shape, p.requires_grad) for name, p in layer.named_parameters())


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash and flex attention keep: queries, keys, values, the output and one fp32 number per head and query."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise RuntimeError("a layer on the meta device is only counted")


def _saved_bytes(layer: nn.Module, width: int, dtype: torch.dtype, tokens: int = 64) -> float:
    """Bytes per token that autograd keeps of one layer: its forward is run on the meta device and what it saves is counted.

    Parameters and buffers are there anyway; a tensor that several operations keep is one.
    """
    own = {x.untyped_storage()._cdata for x in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            kept[x.untyped_storage()._cdata] = x
        return x

    x = torch.empty(1, tokens, width, device="meta", dtype=dtype, requires_grad=True)
    stock, layer.attn._attention_call = layer.attn._attention_call, lambda q, k, v, **_: _FusedAttention.apply(q, k, v)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer(x, input_pos=torch.empty(1, tokens, device="meta", dtype=torch.long))
    layer.attn._attention_call = stock
    return sum(x.untyped_storage().nbytes() for x in kept.values()) / tokens


# ---------------------------------------------------------------------------------------------- the work of one round


@dataclass(frozen=True)
class Workload:
    """One round on one rank; lengths in tokens.

    Attributes:
        student, teacher: prompts of the two views; ``shared``: what they have in common at the start.
        completion: of every rollout.
        groups: sampled in a round; ``trained_groups``: in one of the ``updates`` of it.
        views: that the update looks at.
        micro_batch_tokens: of one forward, both packings alike.
        sampler_rows: sampled at once; None is all.
        chunk_tokens: whose logits exist at once; None is the scorer's own choice.
    """

    student: int
    teacher: int
    shared: int
    completion: int
    group_size: int
    groups: int
    trained_groups: int
    updates: int = 1
    views: tuple[ViewName, ...] = ("student", "teacher")
    sampled_view: ViewName = "student"
    packing: Literal["tree", "padded"] = "tree"
    micro_batch_tokens: int = 8192
    sampler_rows: int | None = None
    chunk_tokens: int | None = None

    def prompt(self, view: ViewName) -> int:
        return self.student if view == "student" else self.teacher


@dataclass(frozen=True)
class Pass:
    """One forward over the rollouts of each micro-batch.

    Attributes:
        model: whose weights.
        views: in this forward together.
        gradient: those of them that gradient flows back from; empty under ``no_grad``.
    """

    model: ModelShape
    views: tuple[ViewName, ...]
    gradient: tuple[ViewName, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """What a pass over some groups feeds to the model.

    Attributes:
        fed: tokens, padding included. ``pairs``: of a query and a key that it sees.
        policy: hidden states that reach the head, all views together.
        micro_batches, fed_at_once, pairs_at_once, policy_at_once: how many forwards, and the largest of them.
    """

    fed: int
    pairs: int
    policy: int
    micro_batches: int
    fed_at_once: int
    pairs_at_once: int
    policy_at_once: int


def count_tokens(work: Workload, views: tuple[ViewName, ...], groups: int) -> Tokens:
    """Of a pass that reads ``views``, in micro-batches that are cut by the tokens of all the views of ``work``."""
    group, rollout = _shares(work, views)
    parts = _micro_batches(work, groups)
    fed = [touched * group.tokens + n * rollout.tokens for n, touched in parts]
    pairs = [touched * group.pairs + n * rollout.pairs for n, touched in parts]
    if work.packing == "tree":  # blocks of queries and keys are computed whole
        pairs = [own + FLEX_BLOCK * tokens for own, tokens in zip(pairs, fed, strict=True)]
    policy = [n * len(views) * work.completion for n, _ in parts]
    return Tokens(sum(fed), sum(pairs), sum(policy), len(parts), max(fed), max(pairs), max(policy))


@dataclass(frozen=True)
class _Share:
    tokens: int
    pairs: int


def _shares(work: Workload, views: tuple[ViewName, ...]) -> tuple[_Share, _Share]:
    """What each group that a micro-batch touches adds to it, and each rollout; a completion's last token is not fed."""
    if work.packing == "padded":  # a row per rollout and view, all as long as the longest
        length = max(work.prompt(view) for view in views) + work.completion - 1
        return _Share(0, 0), _Share(len(views) * length, len(views) * _path_pairs(0, length))
    return tuple(
        _Share(sum(n for _, n in branches), sum(_path_pairs(start, n) for start, n in branches))
        for branches in (_trunk(work, views), _leaf(work, views))
    )


@lru_cache(maxsize=256)
def _micro_batches(work: Workload, groups: int) -> tuple[tuple[int, int], ...]:
    """(rollouts, groups that they belong to) of each, as :class:`pidistill.packing.Packer` cuts them: as few lists as the
    budget allows, spread evenly."""
    rollouts, (group, rollout) = groups * work.group_size, _shares(work, work.views)

    def touched(first: int, n: int) -> int:
        return (first + n - 1) // work.group_size - first // work.group_size + 1

    def tokens(first: int, n: int) -> int:
        return touched(first, n) * group.tokens + n * rollout.tokens

    def cut(budget: int) -> list[tuple[int, int]]:
        """Consecutive rollouts as long as they fit, at least one."""
        parts, first = [], 0
        while first < rollouts:
            n = max(1, bisect_right(range(1, rollouts - first + 1), budget, key=partial(tokens, first)))
            parts.append((n, touched(first, n)))
            first += n
        return parts or [(0, 0)]

    high = max(1, work.micro_batch_tokens)
    most = len(cut(high))
    low = min(high, tokens(0, rollouts) // most)  # less cannot hold all of them
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= most else (middle + 1, high)
    return tuple(cut(high))


Branch = tuple[int, int]  # (position of its first token, tokens)


def _trunk(work: Workload, views: tuple[ViewName, ...]) -> list[Branch]:
    if len(views) == 1:
        return [(0, work.prompt(views[0]))]
    return [(0, work.shared), *((work.shared, work.prompt(view) - work.shared) for view in views)]


def _leaf(work: Workload, views: tuple[ViewName, ...]) -> list[Branch]:
    """One completion under each view; views with the same prompt are one path."""
    same = len(views) == 2 and work.shared == work.student == work.teacher
    return [(work.prompt(view), work.completion - 1) for view in views[: 1 if same else None]]


def _path_pairs(start: int, tokens: int) -> int:
    """Each token sees the whole path above it, and itself."""
    return start * tokens + tokens * (tokens + 1) // 2


@dataclass(frozen=True)
class Setup:
    """How a round is trained.

    Attributes:
        model: the one that is trained.
        update: passes of every micro-batch of an update; ``behaviour``: passes over the round before its first update.
        teacher_parameters: of weights beside the trained ones; ``average_elements``: of an fp32 moving average.
        state_bytes: optimizer states per trained element.
        ranks, reshard, cpu_offload: of FSDP2; one rank shards nothing.
        checkpointing: activations of a layer are computed again in the backward.
        device: "cuda" or "cpu".
    """

    model: ModelShape
    update: tuple[Pass, ...]
    behaviour: tuple[Pass, ...] = ()
    teacher_parameters: int = 0
    average_elements: int = 0
    state_bytes: float = 8.0
    ranks: int = 1
    reshard: bool = True
    cpu_offload: bool = False
    checkpointing: bool = False
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def trained_pass(self) -> Pass:
        return next(one for one in self.update if one.gradient)

    @property
    def constant_passes(self) -> tuple[Pass, ...]:
        return tuple(one for one in self.update if not one.gradient)


# ---------------------------------------------------------------------------------------------- memory

# Python, torch and the data on a CPU; the context and the libraries' workspaces on CUDA.
_LIBRARIES_BYTES = {"cpu": 0.5 * 2**30, "cuda": 0.8 * 2**30}
# Temporaries of the rows whose numbers the head makes at once; see _BLOCK_ELEMENTS there.
_HEAD_TEMPORARIES = 8
# Of each row's next-token distribution while it is drawn from: logits, in fp32, and their weights. Passes over it are more.
_LOGIT_BYTES, _LOGIT_CROSSED_BYTES = 12, 32


def memory(setup: Setup, work: Workload) -> dict[str, dict[str, float]]:
    """Bytes per rank, by phase and part, at the phase's peak."""
    parts = {
        "rollout": _rollout_bytes(setup, work),
        "update": _update_bytes(setup, work),
        "optimizer": _optimizer_bytes(setup),
    }
    if setup.constant_passes or setup.behaviour:
        parts["teacher"] = _teacher_bytes(setup, work)
    if not work.groups:
        del parts["rollout"]
    return {phase: _resident_bytes(setup) | own for phase, own in parts.items()}


def peak(parts: dict[str, dict[str, float]]) -> tuple[str, float]:
    """The phase that needs most, and its bytes."""
    return max(((phase, sum(own.values())) for phase, own in parts.items()), key=lambda pair: pair[1])


def _resident_bytes(setup: Setup) -> dict[str, float]:
    """What is there in every phase; FSDP2 shards all of it, and with offloading the device holds none of it."""
    model, share = setup.model, 0.0 if setup.cpu_offload else 1.0 / setup.ranks
    return {
        "libraries": _LIBRARIES_BYTES[setup.device],
        "weights": model.parameters * model.item_bytes * share + model.buffers_bytes,
        "optimizer states": model.trained * setup.state_bytes * share,
        "teacher weights": setup.teacher_parameters * model.item_bytes * share,
        "moving average": setup.average_elements * 4 * share,
    }


def _rollout_bytes(setup: Setup, work: Workload) -> dict[str, float]:
    model, prompt = setup.model, work.prompt(work.sampled_view)
    rows = min(work.sampler_rows or work.groups * work.group_size, work.groups * work.group_size)
    read_at_once = max(prompt, min(ceil(rows / work.group_size) * prompt, _TOKENS_PER_READ))
    return {
        # Gathered once per rollout on every rank, beside its shard.
        "gathered weights": _gathered_bytes(setup, whole=True),
        "keys and values": rows * _columns(prompt, prompt + work.completion - 1) * _kv_bytes(model),
        "prefill or step": max(read_at_once * _passing_bytes(model), rows * model.vocabulary * _LOGIT_BYTES),
    }


def _columns(prompt: int, needed: int) -> int:
    """Of the cache in the end: it grows by a quarter, at least by 64, whenever it is full."""
    columns = prompt + max(64, prompt // 4)
    while columns < needed:
        columns += 1 + max(64, (columns + 1) // 4)
    return columns


def _kv_bytes(model: ModelShape) -> int:
    """Of one token, all layers."""
    return 2 * model.layers * model.kv_heads * model.head_dim * model.item_bytes


def _passing_bytes(model: ModelShape) -> float:
    """Of one token in a forward without gradient: a layer's gate, up and product, and the residual beside two fp32 norms."""
    return 3 * model.widest * model.item_bytes + 3 * model.width * 4


def _gathered_bytes(setup: Setup, *, whole: bool) -> float:
    """Full parameters on a rank: of the whole model, or of the root (embedding and head) and two layers, one fetched ahead."""
    model = setup.model
    if setup.ranks == 1 and not setup.cpu_offload:
        return 0.0
    if whole or not setup.reshard:
        return model.parameters * model.item_bytes
    embeddings = model.head * (1 if model.tied else 2)
    return (embeddings + 2 * model.maps / model.layers) * model.item_bytes


def _teacher_bytes(setup: Setup, work: Workload) -> dict[str, float]:
    """Forwards without gradient; between micro-batches of an update the gradients are there too."""
    passes = (*setup.constant_passes, *setup.behaviour)
    forwards = [count_tokens(work, one.views, work.trained_groups).fed_at_once * _passing_bytes(one.model) for one in passes]
    return {
        "gathered weights": _gathered_bytes(setup, whole=False),
        "gradients": _gradient_bytes(setup),
        "activations": max(forwards),
        "head": _head_matrices_bytes(setup, work),
    }


def _update_bytes(setup: Setup, work: Workload) -> dict[str, float]:
    """Forward, head and backward of a micro-batch, the gradients of those before it being there."""
    one, model = setup.trained_pass, setup.model
    tokens = count_tokens(work, one.views, work.trained_groups)
    head_gradient = _head_gradient_bytes(setup)
    backward = tokens.fed_at_once * _backward_bytes(model, setup.checkpointing)
    gathered = _gathered_bytes(setup, whole=False)
    accumulated = _gradient_bytes(setup)
    activations = tokens.fed_at_once * _activation_bytes(model, setup.checkpointing)
    if setup.device == "cpu" and work.packing == "tree":
        activations += 4 * tokens.pairs_at_once  # the mask, an fp32 bias for each block of queries
    if tokens.micro_batches == 1:  # gradients come as activations go; the head's, and the layer at work, stand beside both
        accumulated, activations = (0.0, activations) if activations > accumulated else (accumulated, 0.0)
    return {
        "gathered weights": gathered * (2 if setup.ranks > 1 else 1),  # and their gradients, before these are scattered
        "gradients": accumulated,
        "activations": activations,
        "hidden states": tokens.policy_at_once * model.width * (2 * model.item_bytes + 8),
        "head": head_gradient + max(_head_matrices_bytes(setup, work), backward),
    }


def _gradient_bytes(setup: Setup) -> float:
    return 0.0 if setup.cpu_offload else setup.model.trained * setup.model.item_bytes / setup.ranks


def _activation_bytes(model: ModelShape, checkpointing: bool) -> float:
    """Of one token: what autograd keeps of every layer, or each layer's input alone."""
    return model.layers * model.width * model.item_bytes if checkpointing else model.saved_bytes


def _backward_bytes(model: ModelShape, checkpointing: bool) -> float:
    """Of one token: gradients inside the layer at work, and with checkpointing all that its second forward keeps."""
    return 4 * model.widest * model.item_bytes + 3 * model.width * 4 + (model.layer_saved_bytes if checkpointing else 0.0)


def _head_gradient_bytes(setup: Setup) -> float:
    """The fp32 buffer that chunks are added to, its copy in the weight's dtype, and the embedding's own share if it is tied."""
    model = setup.model
    if not model.head_trained:
        return 0.0
    return model.head * (4 + (model.item_bytes if model.item_bytes < 4 else 0) + (model.item_bytes if model.tied else 0))


def _head_matrices_bytes(setup: Setup, work: Workload) -> float:
    """Logits of a chunk, all views; temporaries of a block; on CPU in bf16 an fp32 copy to add to the head's gradient."""
    model, views = setup.model, len({view for one in setup.update for view in one.views})
    policy = count_tokens(work, ("student",), work.trained_groups).policy_at_once
    logits = views * min(work.chunk_tokens or chunk_tokens(model, views, setup.device), policy) * model.vocabulary
    block = min(_BLOCK_ELEMENTS[setup.device], logits)
    copy = 4 if setup.device == "cpu" and model.item_bytes < 4 and model.head_trained else 0
    return logits * (model.item_bytes + copy) + _HEAD_TEMPORARIES * block * 4


def chunk_tokens(model: ModelShape, views: int, device: str) -> int:
    """The head's own choice of tokens whose logits exist at once."""
    return max(1, _CHUNK_ELEMENTS[device] // (views * model.vocabulary))


def _optimizer_bytes(setup: Setup) -> dict[str, float]:
    """The step's own copies: on CUDA torch works on all parameters together, elsewhere on one after the other."""
    model = setup.model
    together = model.trained / setup.ranks if setup.device == "cuda" and not setup.cpu_offload else model.head
    return {"gradients": _gradient_bytes(setup), "step": together * model.item_bytes if setup.state_bytes else 0.0}


# ---------------------------------------------------------------------------------------------- time

# Times that an element which autograd keeps crosses the memory in a forward: written, read, and what is not kept beside it.
_CROSSINGS = 3
# Passes over an fp32 [tokens, vocabulary] matrix per view: softmax and divergences, and their gradient where there is one.
_HEAD_CROSSINGS = 12


def seconds(setup: Setup, work: Workload, device: Device) -> dict[str, float]:
    """Of one round on one rank, by phase."""
    result = dict.fromkeys(PHASES, 0.0)
    if work.groups:
        result["rollout"] = _rollout_s(setup.model, work, device)
    constants = [(one, 1, work.groups) for one in setup.behaviour]
    constants += [(one, work.updates, work.trained_groups) for one in setup.constant_passes]
    for one, times, groups in constants:
        tokens = count_tokens(work, one.views, groups)
        result["teacher"] += times * _forward_s(one.model, tokens, device)
        result["head"] += times * _head_s(one, tokens, device)
    one = setup.trained_pass
    tokens = count_tokens(work, one.views, work.trained_groups)
    result["forward"] = work.updates * _forward_s(one.model, tokens, device)
    result["head"] += work.updates * _head_s(one, tokens, device)
    result["backward"] = work.updates * _backward_s(one.model, tokens, device) + setup.checkpointing * result["forward"]
    result["optimizer"] = work.updates * _optimizer_s(setup, device)
    return result


def _forward_s(model: ModelShape, tokens: Tokens, device: Device) -> float:
    flops = 2 * model.maps * tokens.fed + _attention_flops(model, tokens)
    crossed = _CROSSINGS * model.saved_bytes * tokens.fed
    return flops / device.flops_per_s + crossed / device.bytes_per_s + model.layers * device.layer_s * tokens.micro_batches


def _backward_s(model: ModelShape, tokens: Tokens, device: Device) -> float:
    """Gradients of every input and of the trained weights; attention computes its scores again: five products, not two."""
    flops = 2 * (model.maps + model.trained_maps) * tokens.fed + 2.5 * _attention_flops(model, tokens)
    crossed = 2 * _CROSSINGS * model.saved_bytes * tokens.fed
    return flops / device.flops_per_s + crossed / device.bytes_per_s + 2 * model.layers * device.layer_s * tokens.micro_batches


def _attention_flops(model: ModelShape, tokens: Tokens) -> float:
    return 4 * model.layers * model.heads * model.head_dim * tokens.pairs


def _head_s(one: Pass, tokens: Tokens, device: Device) -> float:
    """Logits of every view; where gradient flows, back to the hidden states, and to the head's weight if it is trained."""
    products = 2 * len(one.views) + 2 * len(one.gradient) * (1 + one.model.head_trained)
    per_view = tokens.policy / len(one.views)
    crossed = _HEAD_CROSSINGS * 4 * one.model.vocabulary * tokens.policy
    return per_view * products * one.model.head / device.flops_per_s + crossed / device.bytes_per_s


def _optimizer_s(setup: Setup, device: Device) -> float:
    """Reads gradient, weight and states; writes weight and states."""
    model = setup.model
    per_element = 3 * model.item_bytes + 2 * setup.state_bytes
    return model.trained / setup.ranks * per_element / device.bytes_per_s


def _rollout_s(model: ModelShape, work: Workload, device: Device) -> float:
    """Each prompt read once per group, then step after step for all rows; a step reads every weight, key and value."""
    prompt, rows = work.prompt(work.sampled_view), work.groups * work.group_size
    batches = ceil(rows / (work.sampler_rows or rows))
    steps = batches * work.completion
    prefill = Tokens(work.groups * prompt, work.groups * _path_pairs(0, prompt), 0, batches, 0, 0, 0)
    context = rows * (work.completion * prompt + _path_pairs(0, work.completion))  # keys that all rows' steps look at
    elements = model.maps + model.head
    products = 2 * elements * rows * work.completion + 4 * model.layers * model.heads * model.head_dim * context
    weights = elements * model.item_bytes * steps
    crossed = context * _kv_bytes(model) + rows * work.completion * model.vocabulary * _LOGIT_CROSSED_BYTES
    # Rows share a weight that is read: products hide that, or it hides them.
    work_s = max(products / device.thin_flops_per_s, weights / device.bytes_per_s) + crossed / device.bytes_per_s
    launches = steps * model.layers * device.layer_s
    # Launches run ahead of a GPU, and take turns with the work on a CPU.
    decode = max(launches, work_s) if device.kind == "cuda" else launches + work_s
    return _forward_s(model, prefill, device) + decode
