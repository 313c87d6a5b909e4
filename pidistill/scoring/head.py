"""Turn hidden states and the head's weight into per-token numbers, chunk by chunk: logits are computed only here.

A [tokens, vocabulary] tensor never exists, and peak memory does not grow with tokens. :func:`_chunk_by_chunk` is the one pass:

    logits of a chunk, all sides that share the head in one product       [sides · C, V], one buffer, reused
    → numbers of its tokens (log-probs, divergences, entropies)            row by row, so that temporaries stay in the cache
    → what each number counts for in the loss, its coefficient             [C] per number
    → gradient of the logits, written over them → of the hidden states, and added to that of the head

Given the loss (:class:`ScorePlan`), the first pass forms the gradients on the way: each logit is computed once. Without it, or
where what arrives in the backward is not that loss's gradient up to one factor, a second pass takes the coefficients that
arrived, so that the gradients are right for any use of the numbers.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pidistill.models.precision import bf16_factors, multiply_head, widen_head
from pidistill.scoring.head_numbers import ScorePlan, at_least_fp32, cap_logits, chunk_numbers, logits_to_gradients
from pidistill.types import check_per_token

OTHER_LOSS = (
    "the loss given to the scorer is not the one that was differentiated (up to one factor), so the head runs twice: right, "
    "but slower than with the loss that is used, or with none"
)


@dataclass(frozen=True)
class ConstantPart:
    """Hold one summand of a constant side's logits: share · cap(hidden @ weightᵀ).

    share: a number, or one per token where the part scores some rollouts only: 0 on the others.
    hidden: None is that of the teacher view which the trained model computes. weight: None is the trained model's head, and
    its cap; ``cap`` is that of another head.
    """

    share: float | Float[Tensor, " N"]
    hidden: Float[Tensor, "N H"] | None
    weight: Float[Tensor, "V H"] | None
    cap: float | None = None

    def logits(
        self, live_hidden: Tensor | None, head: Float[Tensor, "V1 H1"], cap: float | None, chunk: slice
    ) -> Float[Tensor, "C V"]:
        hidden = live_hidden if self.hidden is None else self.hidden
        if self.weight is None:
            return cap_logits(multiply_head(hidden[chunk], head), cap)
        return cap_logits(multiply_head(hidden[chunk], self.weight), self.cap)

    def share_of(self, chunk: slice) -> float | Float[Tensor, "C 1"]:
        return self.share[chunk, None] if isinstance(self.share, Tensor) else self.share

    def with_wide_head(self) -> "ConstantPart":
        return self if self.weight is None else replace(self, weight=widen_head(self.weight))


# The given teacher is a constant that stands beside a live, trained teacher view.
_LIVE_SIDES = ("student", "teacher")


def apply_head(
    plan: ScorePlan,
    hidden: dict[str, Float[Tensor, "N H"]],
    weight: Float[Tensor, "V H"],
    constants: dict[str, list[ConstantPart]] | None = None,
    wide: Float[Tensor, "V H"] | None = None,
) -> Float[Tensor, "K N"]:
    """Return stacked per-token numbers of the live sides' hidden states, which share ``weight``, and of constant ones.

    ``wide`` is the weight as :func:`multiply_head` wants it, where it exists (:func:`own_wide_head`).
    """
    return _ChunkedHead.apply(plan, constants or {}, wide, weight, *[hidden.get(side) for side in _LIVE_SIDES])


class _ChunkedHead(torch.autograd.Function):
    """Compute the [K, N] numbers of :class:`ScorePlan`; the backward scales gradients already formed, or runs a second pass."""

    @staticmethod
    def forward(
        ctx, plan: ScorePlan, constants: dict, wide: Tensor | None, weight: Tensor, *sides: Tensor | None
    ) -> Float[Tensor, "K N"]:
        ctx.plan, ctx.constants, ctx.wide, ctx.ready = plan, constants, wide, None
        ctx.save_for_backward(weight, *sides)
        hidden = _named(sides)
        if plan.loss is None or not any(ctx.needs_input_grad):
            return _chunk_by_chunk(plan, hidden, weight, constants, wide).numbers
        done = _chunk_by_chunk(plan, hidden, weight, constants, wide, _coefficients_of_loss(plan), ctx.needs_input_grad[3])
        ctx.ready = replace(done, numbers=None)  # an output kept here would keep its own graph alive
        return done.numbers

    @staticmethod
    def backward(ctx, grad_outputs: Float[Tensor, "K N"]):
        weight, *sides = ctx.saved_tensors
        wanted = grad_outputs[ctx.plan.rows_with_gradient]
        # Freed with the first use: a second backward of a retained graph runs the second pass.
        done, ctx.ready = ctx.ready, None
        scale = None if done is None else _common_factor(wanted, done.coefficients)
        if scale is None:
            if done is not None:
                warnings.warn(OTHER_LOSS, stacklevel=1)
            done, scale = None, 1.0  # its memory before the next one's
            of_chunk = lambda chunk, _: wanted[:, chunk]  # noqa: E731
            trained = ctx.needs_input_grad[3]
            done = _chunk_by_chunk(ctx.plan, _named(sides), weight, ctx.constants, ctx.wide, of_chunk, trained)
        grads = [done.grad_weight, *[done.grad_hidden.get(side) for side in _LIVE_SIDES]]
        grad_weight, *grad_sides = [g if g is None or scale == 1.0 else g.mul_(scale) for g in grads]
        return None, None, None, None if grad_weight is None else grad_weight.to(weight.dtype), *grad_sides


def _named(sides: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {side: h for side, h in zip(_LIVE_SIDES, sides, strict=True) if h is not None}


def _common_factor(wanted: Float[Tensor, "R N"], ready: Float[Tensor, "R N"]) -> float | None:
    """Return s with wanted = s · ready up to rounding, or None. Not finite (a broken loss): in the same places."""
    finite = ready.isfinite()
    if not torch.equal(finite, wanted.isfinite()):
        return None
    wanted, ready = wanted.double().where(finite, 0.0), ready.double().where(finite, 0.0)
    factor = (wanted * ready).sum() / (ready * ready).sum().clamp(min=torch.finfo(torch.float64).tiny)
    expected = factor * ready
    slack = 1e-5 * expected.abs() + 1e-6 * expected.abs().sum() / max(1, expected.numel())
    return float(factor) if bool(((wanted - expected).abs() <= slack).all()) else None


# ---------------------------------------------------------------------------------------------- the pass

# [R, C] of a chunk, R the numbers with gradient: ∂loss/∂number, from the chunk's place among the tokens and its numbers.
Coefficients = Callable[[slice, Float[Tensor, "K C"]], Float[Tensor, "R C"]]


@dataclass
class _Pass:
    """Hold numbers [K, N] and, where coefficients were given, those [R, N] and the gradients (the head's at least in fp32)."""

    numbers: Float[Tensor, "K N"] | None
    coefficients: Float[Tensor, "R N"] | None
    grad_hidden: dict[str, Float[Tensor, "N H"]]
    grad_weight: Float[Tensor, "V H"] | None


@torch.no_grad()
def _chunk_by_chunk(
    plan: ScorePlan,
    hidden: dict[str, Float[Tensor, "N H"]],
    weight: Float[Tensor, "V H"],
    constants: dict[str, list[ConstantPart]],
    wide: Float[Tensor, "V H"] | None = None,
    coefficients: Coefficients | None = None,
    trained_head: bool = False,
) -> _Pass:
    """Compute the numbers of all tokens and, with ``coefficients``, the gradients of Σ coefficient · number on the way."""
    own = hidden | _constants_of_head(constants)
    others = {side: terms for side, terms in constants.items() if side not in own}
    done = _nothing_yet(plan, hidden, weight, coefficients is not None, trained_head)
    wide = widen_head(weight) if wide is None else wide
    equal = _rows_equal_to_student(own, others, hidden.get("teacher"), weight, wide)
    chunks = list(plan.chunks(len(own | others) * weight.shape[0]))
    others = {side: [term.with_wide_head() for term in terms] for side, terms in others.items()}
    buffer = done.numbers.new_empty(len(own) * max((c.stop - c.start for c in chunks), default=0), weight.shape[0])
    for chunk in chunks:
        size = chunk.stop - chunk.start
        logits = {side: _term_logits(terms, hidden.get("teacher"), wide, plan.cap, chunk) for side, terms in others.items()}
        if own:
            stacked = torch.cat([h[chunk] for h in own.values()])
            products = cap_logits(multiply_head(stacked, wide, out=buffer[: len(stacked)]), plan.cap)
            logits |= dict(zip(own, products.split(size), strict=True))
        for side, rows in equal.items():
            logits[side][rows[chunk]] = logits["student"][rows[chunk]]
        normalisers = chunk_numbers(plan, chunk, logits, done.numbers)
        if coefficients is not None:
            done.coefficients[:, chunk] = coefficients(chunk, done.numbers[:, chunk])
            logits_to_gradients(plan, chunk, logits, normalisers, done.coefficients[:, chunk], list(hidden))
            # The live sides are the first of the stack.
            trained = len(hidden) * size
            _add_gradients(done, chunk, products[:trained], stacked[:trained], wide)
    return done


def _nothing_yet(
    plan: ScorePlan, hidden: dict[str, Float[Tensor, "N H"]], weight: Float[Tensor, "V H"], gradients: bool, trained_head: bool
) -> _Pass:
    tokens = plan.targets.numel()
    numbers = at_least_fp32(weight[:0]).new_empty(len(plan.names), tokens)
    if not gradients:
        return _Pass(numbers, None, {}, None)
    coefficients = numbers.new_zeros(len(plan.rows_with_gradient), tokens)
    # Chunks are summed in fp32 also for a bf16 head; the first one overwrites. A frozen head (LoRA) has no buffer.
    allocate = torch.empty_like if tokens else torch.zeros_like
    grad_weight = allocate(weight, dtype=numbers.dtype) if trained_head else None
    return _Pass(numbers, coefficients, {side: torch.zeros_like(h) for side, h in hidden.items()}, grad_weight)


def _add_gradients(
    done: _Pass, chunk: slice, grad_logits: Float[Tensor, "M V"], hidden: Float[Tensor, "M H"], weight: Float[Tensor, "V H"]
) -> None:
    """Add the gradients of a chunk's hidden states, and its share of the head's; M = live sides · C.

    In bf16 both products have bf16 factors, and the head's gradient is added up in fp32.
    """
    total, beta, grads = done.grad_weight, float(chunk.start > 0), grad_logits.to(weight.dtype)
    with bf16_factors(hidden.dtype == torch.bfloat16):
        for side, grad in zip(done.grad_hidden, (grads @ weight).split(chunk.stop - chunk.start), strict=True):
            done.grad_hidden[side][chunk] = grad
        if total is not None and total.dtype == weight.dtype:
            total.addmm_(grads.T, hidden.to(total.dtype), beta=beta)
        elif total is not None:
            torch.addmm(total, grads.T, hidden, beta=beta, out_dtype=total.dtype, out=total)


def _constants_of_head(constants: dict[str, list[ConstantPart]]) -> dict[str, Float[Tensor, "N H"]]:
    """Return the hidden states of the constant sides that are one product with the trained model's head."""
    single = {side: terms[0] for side, terms in constants.items() if len(terms) == 1}
    return {side: term.hidden for side, term in single.items() if term.weight is None and term.hidden is not None}


def _rows_equal_to_student(
    own: dict[str, Float[Tensor, "N H"]],
    others: dict[str, list[ConstantPart]],
    live_teacher: Float[Tensor, "N H"] | None,
    weight: Float[Tensor, "V H"],
    wide: Float[Tensor, "V H"],
) -> dict[str, Bool[Tensor, " N"]]:
    """Return, per other side, the tokens whose hidden states and head equal the student's to the bit; a side without is absent.

    A head is compared in its own dtype: with the student's ``weight``, or with that in fp32, ``wide``.

    Their logits are copied: two products of the same numbers may round differently, and a teacher that equals the student must
    give a divergence and a gradient of exactly 0.
    """
    student, found = own.get("student"), {}
    if student is None:
        return found
    sides = {side: [ConstantPart(1.0, h, None)] for side, h in own.items() if side != "student"} | others
    for side, terms in sides.items():
        rows = torch.ones(len(student), dtype=torch.bool, device=student.device)
        for term in terms:
            h, w = live_teacher if term.hidden is None else term.hidden, weight if term.weight is None else term.weight
            is_equal = torch.zeros_like(rows)
            if h.shape == student.shape and w.shape == weight.shape:
                is_equal = (h == student).all(-1)
                ours = weight if w.dtype == weight.dtype else wide
                same_head = not bool(is_equal.any()) or w is ours or (w.dtype == ours.dtype and torch.equal(w, ours))
                is_equal = is_equal & same_head
            rows = rows & (is_equal | (term.share == 0) if isinstance(term.share, Tensor) else is_equal)
        if bool(rows.any()):
            found[side] = rows
    return found


def _term_logits(
    terms: list[ConstantPart], live_teacher: Tensor | None, weight: Tensor, cap: float | None, chunk: slice
) -> Float[Tensor, "C V"]:
    """Return the logits of a constant side; a mixture has the ids that all its terms have."""
    parts = [term.logits(live_teacher, weight, cap, chunk) for term in terms]
    if len(parts) == 1:
        return parts[0]
    size = min(part.shape[-1] for part in parts)
    return sum(term.share_of(chunk) * at_least_fp32(part[:, :size]) for term, part in zip(terms, parts, strict=True))


def _coefficients_of_loss(plan: ScorePlan) -> Coefficients:
    """Return ∂loss/∂number of a chunk's tokens, by autograd over the chunk's few numbers."""
    rows = plan.rows_with_gradient

    def coefficients(chunk: slice, numbers: Float[Tensor, "K C"]) -> Float[Tensor, "R C"]:
        with torch.enable_grad():
            leaves = [numbers[row].clone().requires_grad_() for row in rows]
            values = list(numbers.clone())
            for row, leaf in zip(rows, leaves, strict=True):
                values[row] = leaf
            loss = plan.loss(chunk, plan.as_scores(values))
            check_per_token(loss, numbers.shape[1])
            total = loss.sum()
        if not leaves or not total.requires_grad:
            return numbers.new_zeros(len(rows), numbers.shape[1])
        return torch.stack(torch.autograd.grad(total, leaves, materialize_grads=True))

    return coefficients
