"""The one place where logits meet tokens.

``score`` runs the model on both views of a batch and returns per-token numbers (log-probs of the sampled tokens,
full-vocabulary divergences, entropies). The output head is applied inside the model's own forward, where FSDP2 has its weight
unsharded, to the hidden states that predict policy tokens only, and chunk by chunk: a [tokens, vocabulary] tensor never
exists. The backward recomputes a chunk's logits and adds its share to one gradient buffer of the head, so peak memory does not
grow with tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder

from pidistill.divergences import divergence, entropy
from pidistill.errors import InputError
from pidistill.teachers import Teacher, Voice
from pidistill.tree_attention import read_trees
from pidistill.types import Batch, Divergence, ScoreRequest, Scores, View

# fp32 elements of one [chunk, vocabulary] matrix; about ten such matrices live at once. On CPU just above the 32 MiB from which
# glibc returns memory to the system when it is freed: smaller ones fragment its heap to twice the peak.
_CHUNK_ELEMENTS = {"cpu": 10 * 2**20, "cuda": 2**26}


def score(
    model: TransformerDecoder,
    batch: Batch,
    request: ScoreRequest,
    *,
    temperature: float = 1.0,
    teacher: Teacher | TransformerDecoder | None = None,
    chunk_tokens: int | None = None,
) -> Scores:
    """Per-token numbers of ``batch`` in both views, at the sampling temperature.

    Where the sides' vocabularies differ in size (padded rows), divergences are between the two distributions cropped to the
    smaller one and renormalised. Log-probs and entropies stay those of the side's whole vocabulary: the sampler drew from it,
    and the ratio to what it recorded stays 1. A sampled id that a side lacks has log-prob −inf there.

    Args:
        model: scores the student view, and the teacher view where that is trained or no ``teacher`` is given.
        request: which views, divergences and entropies, and which sides gradient reaches. A side without gradient is computed
            under ``no_grad`` and costs no gradient memory.
        temperature: divides the logits before the softmax; the one the rollouts were sampled with.
        teacher: whose weights score the teacher view; a live one is as None, a model stands for itself. Others never receive
            gradient. Where the request trains the live teacher view too, they take part only in the divergences whose gradient
            reaches the student alone (the sg T of π-Distill's student half).
        chunk_tokens: tokens whose logits exist at once; by default sized to about 40 MiB per matrix on CPU, 256 on CUDA.

    Returns:
        ``Scores``, fp32. With gradient for the sides that the request names, where grad mode is on.
    """
    if not torch.is_grad_enabled():
        request = replace(request, student_grad=False, teacher_grad=False)
    plan = _Plan(batch.targets, request, temperature, chunk_tokens)
    with torch.set_grad_enabled(request.student_grad or request.teacher_grad):
        return plan.as_scores(_score(plan, model, batch, _voices(teacher, model)))


def _voices(teacher: Teacher | TransformerDecoder | None, model: TransformerDecoder) -> list[Voice]:
    """The given teacher's, none of them where the trained model is the teacher."""
    if isinstance(teacher, nn.Module):
        return [Voice(1.0, teacher)]
    return [] if teacher is None or teacher.live else teacher.mixture(model)


def _score(plan: "_Plan", model: TransformerDecoder, batch: Batch, voices: list[Voice]) -> Float[Tensor, "K N"]:
    """Constant sides first, under no_grad; then one forward of the model for the sides it trains, with the head inside.

    Both views in one call: under FSDP2 every layer is gathered once, and so is the head.
    """
    request, views = plan.request, batch.views
    live = [side for side in request.views if side == "student" or not voices or request.teacher_grad]
    called = [side for side in live if plan.side_has_gradient(side)] or live
    constants = {side: [_constant(Voice(1.0, model), views.of(side), model)] for side in live if side not in called}
    if voices and "teacher" in request.views:
        given = "given_teacher" if "teacher" in live else "teacher"
        # What the live teacher view is about to compute anyway is not computed twice.
        ready = model if "teacher" in called else None
        if given == "teacher" or any(d.grad == "student" for d in request.divergences):
            shared = model if called else None
            constants[given] = [_constant(v, views.of("teacher"), shared, ready) for v in voices]
    if not called:
        return _head(plan, {}, constants["teacher"][0].weight, constants)

    def use(h: Float[Tensor, "M H"], weight: Tensor) -> Tensor:
        of_sides = h.split([batch.targets.numel()] * len(called))
        return _head(plan, dict(zip(called, of_sides, strict=True)), weight, constants)

    return _forward(model, views.of(*called), use)


# ---------------------------------------------------------------------------------------------- the model up to the head


def _forward(
    model: TransformerDecoder, view: View, use: Callable[[Float[Tensor, "N H"], Tensor], Tensor]
) -> Float[Tensor, "..."]:
    """Run ``use(normed hidden states that predict policy tokens, head weight)`` in place of the model's unembedding."""

    def unembed(h: Float[Tensor, "R L H"]) -> Tensor:
        return use(model.norm(h[view.rows, view.columns]), _local_weight(model))

    if view.mask is not None:
        read_trees(model)
    with _unembedding(model, unembed, length=view.tokens.shape[1]):
        return model(view.tokens, mask=view.mask, input_pos=view.positions)


@contextmanager
def _unembedding(model: TransformerDecoder, unembed: Callable[[Tensor], Tensor], length: int) -> Iterator[None]:
    """Shadow ``model.unembed`` on the instance; torchtune and the state dict stay as they are.

    torchtune refuses rows longer than ``max_seq_len``; of a packed row it is the longest path that counts, which the data
    checks.
    """
    longest = model.max_seq_len
    model.unembed, model.max_seq_len = unembed, max(longest, length)
    try:
        yield
    finally:
        del model.unembed
        model.max_seq_len = longest


def _head_module(model: TransformerDecoder) -> nn.Module:
    """The module that owns the head's weight: the output layer, or the embedding it is tied to."""
    head = getattr(model.output, "tied_module", model.output)
    if type(head) not in (nn.Linear, nn.Embedding) and not hasattr(head, "unshard"):
        raise InputError(
            f"cannot score with an output layer of type {type(head).__name__}; use a plain or tied linear head (a LoRA model "
            "with apply_lora_to_output=False)"
        )
    if getattr(head, "bias", None) is not None:
        raise InputError("cannot score with an output layer that has a bias; choose a `model` whose output has none")
    return head


def _local_weight(model: TransformerDecoder) -> Float[Tensor, "V H"]:
    weight = _head_module(model).weight
    if isinstance(weight, DTensor):
        raise InputError(
            "the output head is sharded on its own, so its weight is not gathered in the model's forward; remove `output` and "
            "`tok_embeddings` from custom_sharded_layers"
        )
    return weight


@dataclass(frozen=True)
class _Term:
    """One summand of a constant side's logits: share · hidden @ weightᵀ.

    hidden: None is that of the teacher view which the trained model computes. weight: None is the trained model's head.
    """

    share: float
    hidden: Float[Tensor, "N H"] | None
    weight: Float[Tensor, "V H"] | None

    def logits(self, live_hidden: Tensor | None, head: Float[Tensor, "V1 H1"], chunk: slice) -> Float[Tensor, "C V"]:
        hidden = live_hidden if self.hidden is None else self.hidden
        return hidden[chunk] @ (head if self.weight is None else self.weight).T


@torch.no_grad()
def _constant(voice: Voice, view: View, shared: nn.Module | None, ready: nn.Module | None = None) -> _Term:
    """A voice on a view that gets no gradient.

    Under FSDP2 this is one more gathering of its layers, and of its head, unless that is the head of ``shared``, which is at
    hand in the forward to come. A voice of ``ready`` needs no forward.
    """
    if voice.module is ready and voice.adapters:
        return _Term(voice.share, None, None)
    with voice.weights() as module:
        hidden = _forward(module, view, lambda h, w: h)
    if voice.module is shared:
        return _Term(voice.share, hidden, None)
    weight = _head_module(voice.module).weight.detach()
    return _Term(voice.share, hidden, weight.full_tensor() if isinstance(weight, DTensor) else weight)


# ---------------------------------------------------------------------------------------------- the head, chunk by chunk


@dataclass(frozen=True)
class _Plan:
    """What to compute from a chunk's logits, and in which order the results are stacked."""

    targets: Int[Tensor, " N"]
    request: ScoreRequest
    temperature: float
    chunk_tokens: int | None

    @property
    def names(self) -> list[str | Divergence]:
        logprobs = [f"{view}_logprobs" for view in self.request.views]
        entropies = [f"{view}_entropy" for view in self.request.views if self.request.entropy]
        return [*logprobs, *self.request.divergences, *entropies]

    def has_gradient(self, name: str | Divergence) -> bool:
        if isinstance(name, Divergence):
            return name.grad != "none"
        return name.endswith("_logprobs") and self.side_has_gradient(name.removesuffix("_logprobs"))

    def side_has_gradient(self, side: str) -> bool:
        return {"student": self.request.student_grad, "teacher": self.request.teacher_grad}.get(side, False)

    def chunks(self, vocabulary: int) -> Iterator[slice]:
        elements = _CHUNK_ELEMENTS.get(self.targets.device.type, 2**26)
        size = self.chunk_tokens or max(1, elements // vocabulary)
        for start in range(0, self.targets.numel(), size):
            yield slice(start, start + size)

    def from_logits(self, logits: dict[str, Float[Tensor, "C V"]], targets: Int[Tensor, " C"], names: list) -> list[Tensor]:
        """The named per-token numbers of one chunk, each [C]; softmax and divergences in fp32 (float64 stays float64)."""
        logp = {view: torch.log_softmax(_at_least_fp32(x) / self.temperature, dim=-1) for view, x in logits.items()}
        values: dict[Any, Tensor] = {}
        for name in names:
            if isinstance(name, Divergence):
                teacher = "given_teacher" if name.grad == "student" and "given_teacher" in logp else "teacher"
                # Where no gradient is recorded, requests that differ only in their gradient are one number.
                wanted = name if torch.is_grad_enabled() else replace(name, grad="none")
                if (wanted, teacher) not in values:
                    values[wanted, teacher] = divergence(wanted, *_cropped(logp[teacher], logp["student"]))
                values[name] = values[wanted, teacher]
            elif name.endswith("_logprobs"):
                values[name] = _at(logp[name.removesuffix("_logprobs")], targets)
            else:
                values[name] = entropy(logp[name.removesuffix("_entropy")].detach())
        return [values[name] for name in names]

    def as_scores(self, outputs: Float[Tensor, "K N"]) -> Scores:
        named = dict(zip(self.names, outputs, strict=True))
        return Scores(
            student_logprobs=named.get("student_logprobs"),
            teacher_logprobs=named.get("teacher_logprobs"),
            divergences={name: value for name, value in named.items() if isinstance(name, Divergence)},
            student_entropy=named.get("student_entropy"),
            teacher_entropy=named.get("teacher_entropy"),
        )


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cropped(*logps: Float[Tensor, "C _"]) -> list[Float[Tensor, "C V"]]:
    """Both sides over the ids that both have, renormalised; unchanged where they have the same."""
    size = min(logp.shape[-1] for logp in logps)
    return [logp if logp.shape[-1] == size else torch.log_softmax(logp[:, :size], dim=-1) for logp in logps]


def _at(logp: Float[Tensor, "C V"], targets: Int[Tensor, " C"]) -> Float[Tensor, " C"]:
    """Log-prob of each target; −inf for an id beyond this side's vocabulary, which a model with more padded rows may sample."""
    last = logp.shape[-1] - 1
    return logp.gather(-1, targets.clamp(max=last)[:, None]).squeeze(-1).masked_fill(targets > last, -torch.inf)


# The given teacher is a constant that stands beside a live, trained teacher view.
_LIVE_SIDES = ("student", "teacher")


def _head(
    plan: _Plan,
    hidden: dict[str, Float[Tensor, "N H"]],
    weight: Float[Tensor, "V H"],
    constants: dict[str, list[_Term]] | None = None,
) -> Float[Tensor, "K N"]:
    """Stacked per-token numbers from the hidden states of the live sides, which share ``weight``, and constant ones."""
    return _ChunkedHead.apply(plan, constants or {}, weight, *[hidden.get(side) for side in _LIVE_SIDES])


def _logits(
    hidden: dict[str, Float[Tensor, "N H"]], weight: Float[Tensor, "V H"], constants: dict[str, list[_Term]], chunk: slice
) -> dict[str, Float[Tensor, "C _"]]:
    """Of one chunk, per side; a mixture has the ids that all its terms have."""
    logits = {side: h[chunk] @ weight.T for side, h in hidden.items()}
    for side, terms in constants.items():
        parts = [term.logits(hidden.get("teacher"), weight, chunk) for term in terms]
        logits[side] = parts[0] if len(parts) == 1 else _mixed([term.share for term in terms], parts)
    return logits


def _mixed(shares: list[float], parts: list[Float[Tensor, "C _"]]) -> Float[Tensor, "C V"]:
    size = min(part.shape[-1] for part in parts)
    return sum(share * _at_least_fp32(part[:, :size]) for share, part in zip(shares, parts, strict=True))


class _ChunkedHead(torch.autograd.Function):
    """[K, N] numbers of :class:`_Plan`, with logits recomputed per chunk in the backward."""

    @staticmethod
    def forward(ctx, plan: _Plan, constants: dict, weight: Tensor, *sides: Tensor | None) -> Float[Tensor, "K N"]:
        ctx.plan, ctx.constants = plan, constants
        ctx.save_for_backward(weight, *sides)
        hidden = {side: h for side, h in zip(_LIVE_SIDES, sides, strict=True) if h is not None}
        names, targets = plan.names, plan.targets
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        outputs = torch.empty(len(names), targets.numel(), dtype=dtype, device=weight.device)
        for chunk in plan.chunks(weight.shape[0]):
            logits = _logits(hidden, weight, constants, chunk)
            for k, value in enumerate(plan.from_logits(logits, targets[chunk], names)):
                outputs[k, chunk] = value
        return outputs

    @staticmethod
    def backward(ctx, grad_outputs: Float[Tensor, "K N"]):
        weight, *sides = ctx.saved_tensors
        plan = ctx.plan
        hidden = {side: h for side, h in zip(_LIVE_SIDES, sides, strict=True) if h is not None}
        names = plan.names
        rows = [k for k, name in enumerate(names) if plan.has_gradient(name)]
        # Chunks are summed in fp32 also for a bf16 head. A frozen one (LoRA) has no buffer.
        trained_head = ctx.needs_input_grad[2]
        grad_weight = torch.zeros_like(weight, dtype=_at_least_fp32(weight[:0]).dtype) if trained_head else None
        grad_hidden = {view: torch.zeros_like(h) for view, h in hidden.items()}
        for chunk in plan.chunks(weight.shape[0]):
            logits = {side: x.detach() for side, x in _logits(hidden, weight, ctx.constants, chunk).items()}
            leaves = [logits[view].requires_grad_() for view in hidden]
            with torch.enable_grad():
                values = plan.from_logits(logits, plan.targets[chunk], [names[k] for k in rows])
            grads = torch.autograd.grad(values, leaves, [grad_outputs[k, chunk] for k in rows])
            del values
            for view, grad_logits in zip(hidden, grads, strict=True):
                grad_hidden[view][chunk] = grad_logits @ weight
                if trained_head:
                    grad_weight.addmm_(grad_logits.T.to(grad_weight.dtype), hidden[view][chunk].to(grad_weight.dtype))
        grad_weight = grad_weight.to(weight.dtype) if trained_head else None
        return None, None, grad_weight, *[grad_hidden.get(side) for side in _LIVE_SIDES]
