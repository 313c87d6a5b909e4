"""The one place where logits meet tokens: hidden states and the head's weight → per-token numbers, chunk by chunk.

A [tokens, vocabulary] tensor never exists. The backward recomputes a chunk's logits and adds its share to one gradient buffer
of the head, so peak memory does not grow with tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pidistill.divergences import divergence, entropy
from pidistill.types import Divergence, ScoreRequest, Scores

# fp32 elements of one [chunk, vocabulary] matrix; about ten such matrices live at once. On CPU just above the 32 MiB from which
# glibc returns memory to the system when it is freed: smaller ones fragment its heap to twice the peak.
_CHUNK_ELEMENTS = {"cpu": 10 * 2**20, "cuda": 2**26}


@dataclass(frozen=True)
class Term:
    """One summand of a constant side's logits: share · hidden @ weightᵀ.

    hidden: None is that of the teacher view which the trained model computes. weight: None is the trained model's head.
    """

    share: float
    hidden: Float[Tensor, "N H"] | None
    weight: Float[Tensor, "V H"] | None

    def logits(self, live_hidden: Tensor | None, head: Float[Tensor, "V1 H1"], chunk: slice) -> Float[Tensor, "C V"]:
        hidden = live_hidden if self.hidden is None else self.hidden
        return hidden[chunk] @ (head if self.weight is None else self.weight).T


@dataclass(frozen=True)
class Plan:
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


def apply_head(
    plan: Plan,
    hidden: dict[str, Float[Tensor, "N H"]],
    weight: Float[Tensor, "V H"],
    constants: dict[str, list[Term]] | None = None,
) -> Float[Tensor, "K N"]:
    """Stacked per-token numbers from the hidden states of the live sides, which share ``weight``, and constant ones."""
    return _ChunkedHead.apply(plan, constants or {}, weight, *[hidden.get(side) for side in _LIVE_SIDES])


def _logits(
    hidden: dict[str, Float[Tensor, "N H"]], weight: Float[Tensor, "V H"], constants: dict[str, list[Term]], chunk: slice
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
    """[K, N] numbers of :class:`Plan`, with logits recomputed per chunk in the backward."""

    @staticmethod
    def forward(ctx, plan: Plan, constants: dict, weight: Tensor, *sides: Tensor | None) -> Float[Tensor, "K N"]:
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
