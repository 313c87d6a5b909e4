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
    teacher: TransformerDecoder | None = None,
    chunk_tokens: int | None = None,
) -> Scores:
    """Per-token numbers of ``batch`` in both views, at the sampling temperature.

    Args:
        model: scores the student view, and the teacher view where that is trained or no ``teacher`` is given.
        request: which views, divergences and entropies, and which sides gradient reaches. A side without gradient is computed
            under ``no_grad`` and costs no gradient memory.
        temperature: divides the logits before the softmax; the one the rollouts were sampled with.
        teacher: other weights (frozen, EMA) for the teacher view; never receive gradient. Where the request trains the live
            teacher view too, they take part only in the divergences whose gradient reaches the student alone (the sg T of
            π-Distill's student half).
        chunk_tokens: tokens whose logits exist at once; by default sized to about 40 MiB per matrix on CPU, 256 on CUDA.

    Returns:
        ``Scores``, fp32. With gradient for the sides that the request names, where grad mode is on.
    """
    if not torch.is_grad_enabled():
        request = replace(request, student_grad=False, teacher_grad=False)
    plan = _Plan(batch.targets, request, temperature, chunk_tokens)
    with torch.set_grad_enabled(request.student_grad or request.teacher_grad):
        if len(request.views) == 1:
            outputs = _score_one_view(plan, model if request.views[0] == "student" else teacher or model, batch)
        elif request.student_grad and request.teacher_grad:
            outputs = _score_both_trained(plan, model, batch, teacher)
        else:
            outputs = _score_one_trained(plan, model, batch, teacher)
    return plan.as_scores(outputs)


def _score_one_view(plan: "_Plan", model: TransformerDecoder, batch: Batch) -> Float[Tensor, "K N"]:
    (name,) = plan.request.views
    view = batch.student if name == "student" else batch.teacher
    return _forward(model, view, lambda h, w: _head(plan, {name: h}, w))


def _score_both_trained(
    plan: "_Plan", model: TransformerDecoder, batch: Batch, teacher: TransformerDecoder | None
) -> Float[Tensor, "K N"]:
    """Both views in one call of the model: under FSDP2 every layer is gathered once, and so is the head."""
    both, n = _concatenate(batch.student, batch.teacher), batch.targets.numel()
    given, own = {}, {}
    if teacher is not None and any(d.grad == "student" for d in plan.request.divergences):
        given["given_teacher"], own["given_teacher"] = _constant(teacher, batch.teacher)
    return _forward(model, both, lambda h, w: _head(plan, {"student": h[:n], "teacher": h[n:], **given}, w, own))


def _score_one_trained(
    plan: "_Plan", model: TransformerDecoder, batch: Batch, teacher: TransformerDecoder | None
) -> Float[Tensor, "K N"]:
    """The view without gradient first, under no_grad; its hidden states then stand beside the other's as constants."""
    if plan.request.teacher_grad:
        hidden, _ = _constant(model, batch.student)
        return _forward(model, batch.teacher, lambda h, w: _head(plan, {"student": hidden, "teacher": h}, w))
    hidden, weight = _constant(teacher or model, batch.teacher)
    own = {} if teacher is None else {"teacher": weight}
    return _forward(model, batch.student, lambda h, w: _head(plan, {"student": h, "teacher": hidden}, w, own))


# ---------------------------------------------------------------------------------------------- the model up to the head


def _forward(
    model: TransformerDecoder, view: View, use: Callable[[Float[Tensor, "N H"], Tensor], Tensor]
) -> Float[Tensor, "..."]:
    """Run ``use(normed hidden states that predict policy tokens, head weight)`` in place of the model's unembedding."""

    def unembed(h: Float[Tensor, "B L H"]) -> Tensor:
        return use(model.norm(h[view.rows, view.columns]), _local_weight(model))

    with _unembedding(model, unembed):
        return model(view.tokens)


@contextmanager
def _unembedding(model: TransformerDecoder, unembed: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Shadow ``model.unembed`` on the instance; torchtune and the state dict stay as they are."""
    model.unembed = unembed
    try:
        yield
    finally:
        del model.unembed


def _concatenate(first: View, second: View) -> View:
    """Two views as the rows of one batch, the policy tokens of ``first`` before those of ``second``."""
    length = max(first.tokens.shape[1], second.tokens.shape[1])
    # The filling id is never looked at: padding stands right of every policy token.
    tokens = [nn.functional.pad(v.tokens, (0, length - v.tokens.shape[1])) for v in (first, second)]
    rows = torch.cat([first.rows, second.rows + first.tokens.shape[0]])
    return View(torch.cat(tokens), rows, torch.cat([first.columns, second.columns]))


def _head_module(model: TransformerDecoder) -> nn.Module:
    """The module that owns the head's weight: the output layer, or the embedding it is tied to."""
    head = getattr(model.output, "tied_module", model.output)
    if type(head) not in (nn.Linear, nn.Embedding) and not hasattr(head, "unshard"):
        raise TypeError(f"cannot score with an output layer of type {type(head).__name__}; use a plain (or tied) linear head")
    if getattr(head, "bias", None) is not None:
        raise TypeError("cannot score with an output layer that has a bias")
    return head


def _local_weight(model: TransformerDecoder) -> Float[Tensor, "V H"]:
    weight = _head_module(model).weight
    if isinstance(weight, DTensor):
        raise InputError(
            "the output head is sharded on its own, so its weight is not gathered in the model's forward; remove `output` and "
            "`tok_embeddings` from custom_sharded_layers"
        )
    return weight


@torch.no_grad()
def _constant(model: TransformerDecoder, view: View) -> tuple[Float[Tensor, "N H"], Float[Tensor, "V H"]]:
    """Hidden states of a view that gets no gradient, and the whole head of its model; under FSDP2 one more all-gather."""
    hidden = _forward(model, view, lambda h, w: h)
    weight = _head_module(model).weight.detach()
    return hidden, weight.full_tensor() if isinstance(weight, DTensor) else weight


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
                    values[wanted, teacher] = divergence(wanted, logp[teacher], logp["student"])
                values[name] = values[wanted, teacher]
            elif name.endswith("_logprobs"):
                values[name] = logp[name.removesuffix("_logprobs")].gather(-1, targets[:, None]).squeeze(-1)
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


def _head(
    plan: _Plan,
    hidden: dict[str, Float[Tensor, "N H"]],
    weight: Float[Tensor, "V H"],
    own_weights: dict[str, Float[Tensor, "V H"]] | None = None,
) -> Float[Tensor, "K N"]:
    """Stacked per-token numbers from the hidden states of the :data:`_SIDES`.

    ``weight`` is the head shared by the sides, except where ``own_weights`` names another (constant) one for a side.
    """
    return _ChunkedHead.apply(plan, own_weights or {}, weight, *[hidden.get(side) for side in _SIDES])


# The given teacher is a constant that stands beside a live, trained teacher view.
_SIDES = ("student", "teacher", "given_teacher")


class _ChunkedHead(torch.autograd.Function):
    """[K, N] numbers of :class:`_Plan`, with logits recomputed per chunk in the backward."""

    @staticmethod
    def forward(ctx, plan: _Plan, own: dict, weight: Tensor, *sides: Tensor | None) -> Float[Tensor, "K N"]:
        ctx.plan, ctx.own = plan, own
        ctx.save_for_backward(weight, *sides)
        hidden = {side: h for side, h in zip(_SIDES, sides, strict=True) if h is not None}
        names, targets = plan.names, plan.targets
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        outputs = torch.empty(len(names), targets.numel(), dtype=dtype, device=weight.device)
        for chunk in plan.chunks(weight.shape[0]):
            logits = {view: h[chunk] @ own.get(view, weight).T for view, h in hidden.items()}
            for k, value in enumerate(plan.from_logits(logits, targets[chunk], names)):
                outputs[k, chunk] = value
        return outputs

    @staticmethod
    def backward(ctx, grad_outputs: Float[Tensor, "K N"]):
        weight, *sides = ctx.saved_tensors
        plan, own = ctx.plan, ctx.own
        hidden = {side: h for side, h in zip(_SIDES, sides, strict=True) if h is not None}
        trained = [view for view in hidden if plan.side_has_gradient(view)]
        names = plan.names
        rows = [k for k, name in enumerate(names) if plan.has_gradient(name)]
        # Chunks are summed in fp32 also for a bf16 head.
        grad_weight = torch.zeros_like(weight, dtype=_at_least_fp32(weight[:0]).dtype)
        grad_hidden = {view: torch.zeros_like(hidden[view]) for view in trained}
        for chunk in plan.chunks(weight.shape[0]):
            logits = {view: (h[chunk] @ own.get(view, weight).T).detach() for view, h in hidden.items()}
            leaves = [logits[view].requires_grad_() for view in trained]
            with torch.enable_grad():
                values = plan.from_logits(logits, plan.targets[chunk], [names[k] for k in rows])
            grads = torch.autograd.grad(values, leaves, [grad_outputs[k, chunk] for k in rows])
            del values
            for view, grad_logits in zip(trained, grads, strict=True):
                grad_hidden[view][chunk] = grad_logits @ weight
                grad_weight.addmm_(grad_logits.T.to(grad_weight.dtype), hidden[view][chunk].to(grad_weight.dtype))
        return None, None, grad_weight.to(weight.dtype), *[grad_hidden.get(side) for side in _SIDES]
