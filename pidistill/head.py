"""The one place where logits meet tokens: hidden states and the head's weight → per-token numbers, chunk by chunk.

A [tokens, vocabulary] tensor never exists, and peak memory does not grow with tokens. :func:`_chunk_by_chunk` is the one pass:

    logits of a chunk, all sides that share the head in one product       [sides · C, V], one buffer, reused
    → numbers of its tokens (log-probs, divergences, entropies)            row by row, so that temporaries stay in the cache
    → what each number counts for in the loss, its coefficient             [C] per number
    → gradient of the logits, written over them → of the hidden states, and added to that of the head

Given the loss (:class:`Plan`), the first pass forms the gradients on the way: each logit is computed once. Without it, or where
what arrives in the backward is not that loss's gradient up to one factor, a second pass takes the coefficients that arrived; so
the gradients are right for any use of the numbers.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pidistill.divergences import divergence
from pidistill.types import Divergence, ScoreRequest, Scores

# Elements of the logits of a chunk, over all sides that share the head. Larger ones make better use of the products, which read
# the whole head and its gradient for each chunk: 256 MiB of fp32 on CPU.
_CHUNK_ELEMENTS = {"cpu": 2**26, "cuda": 2**27}
# Of the rows whose numbers are made at once; about eight temporaries of that size live. On CPU they stay in the cache, and are
# small enough that glibc does not return them to the system each time, which costs several times the arithmetic.
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}

OTHER_LOSS = (
    "the loss given to the scorer is not the one that was differentiated (up to one factor), so the head runs twice: right, "
    "but slower than with the loss that is used, or with none"
)

Name = str | Divergence  # "student_logprobs", "teacher_entropy" …, or the divergence asked for


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
    """What to compute of each token, and in which order the results are stacked.

    loss: the loss per token that the caller makes of the scores, for any slice of the tokens; None where it is not known yet.
    """

    targets: Int[Tensor, " N"]
    request: ScoreRequest
    temperature: float
    chunk_tokens: int | None
    loss: Callable[[slice, Scores], Float[Tensor, " C"]] | None = None

    @property
    def names(self) -> list[Name]:
        logprobs = [f"{view}_logprobs" for view in self.request.views]
        entropies = [f"{view}_entropy" for view in self.request.views if self.request.entropy]
        return [*logprobs, *self.request.divergences, *entropies]

    @property
    def rows_with_gradient(self) -> list[int]:
        return [row for row, name in enumerate(self.names) if self._has_gradient(name)]

    def _has_gradient(self, name: Name) -> bool:
        if isinstance(name, Divergence):
            return name.grad != "none"
        return name.endswith("_logprobs") and self.side_has_gradient(name.removesuffix("_logprobs"))

    def side_has_gradient(self, side: str) -> bool:
        return {"student": self.request.student_grad, "teacher": self.request.teacher_grad}.get(side, False)

    def chunks(self, elements_per_token: int) -> Iterator[slice]:
        """Of nearly equal size: a small last one would read the whole head for little."""
        tokens = self.targets.numel()
        most = self.chunk_tokens or max(1, _CHUNK_ELEMENTS.get(self.targets.device.type, 2**26) // elements_per_token)
        size = math.ceil(tokens / math.ceil(tokens / most)) if tokens else 1
        for start in range(0, tokens, size):
            yield slice(start, min(start + size, tokens))

    def as_scores(self, outputs: Float[Tensor, "K N"] | list[Float[Tensor, " N"]]) -> Scores:
        named = dict(zip(self.names, outputs, strict=True))
        return Scores(
            student_logprobs=named.get("student_logprobs"),
            teacher_logprobs=named.get("teacher_logprobs"),
            divergences={name: value for name, value in named.items() if isinstance(name, Divergence)},
            student_entropy=named.get("student_entropy"),
            teacher_entropy=named.get("teacher_entropy"),
        )


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


class _ChunkedHead(torch.autograd.Function):
    """[K, N] numbers of :class:`Plan`; the backward scales the gradients formed on the way, or runs the second pass."""

    @staticmethod
    def forward(ctx, plan: Plan, constants: dict, weight: Tensor, *sides: Tensor | None) -> Float[Tensor, "K N"]:
        ctx.plan, ctx.constants, ctx.ready = plan, constants, None
        ctx.save_for_backward(weight, *sides)
        hidden = _named(sides)
        if plan.loss is None or not any(ctx.needs_input_grad):
            return _chunk_by_chunk(plan, hidden, weight, constants).numbers
        done = _chunk_by_chunk(plan, hidden, weight, constants, _coefficients_of_loss(plan), ctx.needs_input_grad[2])
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
            done = _chunk_by_chunk(ctx.plan, _named(sides), weight, ctx.constants, of_chunk, ctx.needs_input_grad[2])
        grads = [done.grad_weight, *[done.grad_hidden.get(side) for side in _LIVE_SIDES]]
        grad_weight, *grad_sides = [g if g is None or scale == 1.0 else g.mul_(scale) for g in grads]
        return None, None, None if grad_weight is None else grad_weight.to(weight.dtype), *grad_sides


def _named(sides: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {side: h for side, h in zip(_LIVE_SIDES, sides, strict=True) if h is not None}


def _common_factor(wanted: Float[Tensor, "R N"], ready: Float[Tensor, "R N"]) -> float | None:
    """s with wanted = s · ready up to rounding, or None. Not finite (a broken loss): in the same places."""
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
    """numbers [K, N]; where coefficients were given, those [R, N] and the gradients (the head's in fp32 at least)."""

    numbers: Float[Tensor, "K N"] | None
    coefficients: Float[Tensor, "R N"] | None
    grad_hidden: dict[str, Float[Tensor, "N H"]]
    grad_weight: Float[Tensor, "V H"] | None


@torch.no_grad()
def _chunk_by_chunk(
    plan: Plan,
    hidden: dict[str, Float[Tensor, "N H"]],
    weight: Float[Tensor, "V H"],
    constants: dict[str, list[Term]],
    coefficients: Coefficients | None = None,
    trained_head: bool = False,
) -> _Pass:
    """Numbers of all tokens and, with ``coefficients``, the gradients of Σ coefficient · number on the way."""
    own = hidden | _constants_of_head(constants)
    others = {side: terms for side, terms in constants.items() if side not in own}
    done = _nothing_yet(plan, hidden, weight, coefficients is not None, trained_head)
    chunks = list(plan.chunks(len(own | others) * weight.shape[0]))
    buffer = weight.new_empty(len(own) * max((c.stop - c.start for c in chunks), default=0), weight.shape[0])
    for chunk in chunks:
        size = chunk.stop - chunk.start
        logits = {side: _term_logits(terms, hidden.get("teacher"), weight, chunk) for side, terms in others.items()}
        if own:
            stacked = torch.cat([h[chunk] for h in own.values()])
            products = torch.mm(stacked, weight.T, out=buffer[: len(stacked)])
            logits |= dict(zip(own, products.split(size), strict=True))
        normalisers = _chunk_numbers(plan, chunk, logits, done.numbers)
        if coefficients is not None:
            done.coefficients[:, chunk] = coefficients(chunk, done.numbers[:, chunk])
            _logits_to_gradients(plan, chunk, logits, normalisers, done.coefficients[:, chunk], list(hidden))
            # The live sides are the first of the stack.
            trained = len(hidden) * size
            _add_gradients(done, chunk, products[:trained], stacked[:trained], weight)
    return done


def _nothing_yet(
    plan: Plan, hidden: dict[str, Float[Tensor, "N H"]], weight: Float[Tensor, "V H"], gradients: bool, trained_head: bool
) -> _Pass:
    tokens = plan.targets.numel()
    numbers = _at_least_fp32(weight[:0]).new_empty(len(plan.names), tokens)
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
    """Those of a chunk's hidden states, and its share of the head's; M = live sides · C."""
    for side, grad in zip(done.grad_hidden, (grad_logits @ weight).split(chunk.stop - chunk.start), strict=True):
        done.grad_hidden[side][chunk] = grad
    total, beta = done.grad_weight, float(chunk.start > 0)
    if total is None:
        return
    if total.dtype == weight.dtype:
        total.addmm_(grad_logits.T, hidden, beta=beta)
    elif weight.is_cuda:
        torch.addmm(total, grad_logits.T, hidden, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(grad_logits.T.to(total.dtype), hidden.to(total.dtype), beta=beta)


def _constants_of_head(constants: dict[str, list[Term]]) -> dict[str, Float[Tensor, "N H"]]:
    """Hidden states of the constant sides that are one product with the trained model's head."""
    single = {side: terms[0] for side, terms in constants.items() if len(terms) == 1}
    return {side: term.hidden for side, term in single.items() if term.weight is None and term.hidden is not None}


def _term_logits(terms: list[Term], live_teacher: Tensor | None, weight: Tensor, chunk: slice) -> Float[Tensor, "C V"]:
    """Of a constant side; a mixture has the ids that all its terms have."""
    parts = [term.logits(live_teacher, weight, chunk) for term in terms]
    if len(parts) == 1:
        return parts[0]
    size = min(part.shape[-1] for part in parts)
    return sum(term.share * _at_least_fp32(part[:, :size]) for term, part in zip(terms, parts, strict=True))


def _coefficients_of_loss(plan: Plan) -> Coefficients:
    """∂loss/∂number of a chunk's tokens, by autograd over the chunk's few numbers."""
    rows = plan.rows_with_gradient

    def coefficients(chunk: slice, numbers: Float[Tensor, "K C"]) -> Float[Tensor, "R C"]:
        with torch.enable_grad():
            leaves = [numbers[row].clone().requires_grad_() for row in rows]
            values = list(numbers.clone())
            for row, leaf in zip(rows, leaves, strict=True):
                values[row] = leaf
            total = plan.loss(chunk, plan.as_scores(values)).sum()
        if not leaves or not total.requires_grad:
            return numbers.new_zeros(len(rows), numbers.shape[1])
        return torch.stack(torch.autograd.grad(total, leaves, materialize_grads=True))

    return coefficients


# ---------------------------------------------------------------------------------------------- numbers and their gradients
# By hand, in log-prob space. A number's gradient with respect to a side's log-probs is coefficient · matrix; through the
# softmax, a sum G of such terms becomes (G − p · ΣG) / temperature. Logits are products, hence finite: no 0 · inf below.


def _blocks(plan: Plan, chunk: slice, vocabulary: int) -> Iterator[tuple[slice, Int[Tensor, " c"]]]:
    """The rows of a chunk that are looked at together, and their targets."""
    size = max(1, _BLOCK_ELEMENTS.get(plan.targets.device.type, 2**25) // vocabulary)
    targets = plan.targets[chunk]
    for start in range(0, len(targets), size):
        block = slice(start, start + size)
        yield block, targets[block]


def _chunk_numbers(
    plan: Plan, chunk: slice, logits: dict[str, Float[Tensor, "C _"]], numbers: Float[Tensor, "K N"]
) -> dict[str, Float[Tensor, "C 1"]]:
    """Fill the chunk's columns of ``numbers``; returns log Σ exp of every side, from which log-probs are one subtraction."""
    normalisers = {side: numbers.new_empty(len(x), 1) for side, x in logits.items()}
    out = numbers[:, chunk]
    for block, targets in _blocks(plan, chunk, max(x.shape[1] for x in logits.values())):
        logp = {}
        for side, x in logits.items():
            scaled = _scaled(x[block], plan.temperature)
            normalisers[side][block] = torch.logsumexp(scaled, -1, keepdim=True)
            logp[side] = scaled - normalisers[side][block]
        for row, value in enumerate(_block_numbers(plan, logp, targets)):
            out[row, block] = value
    return normalisers


def _block_numbers(plan: Plan, logp: dict[str, Float[Tensor, "c _"]], targets: Int[Tensor, " c"]) -> list[Float[Tensor, " c"]]:
    p = {side: x.exp() for side, x in logp.items()}
    values: dict = {}
    for name in plan.names:
        if isinstance(name, Divergence):
            # Requests that differ only in their gradient are one number, unless their teachers differ.
            teacher = _teacher_of(name, logp)
            key = (replace(name, grad="none"), teacher)
            if key not in values:
                values[key] = _divergence(key[0], teacher, logp, p)
            values[name] = values[key]
        elif name.endswith("_logprobs"):
            values[name] = _at(logp[name.removesuffix("_logprobs")], targets)
        else:
            side = name.removesuffix("_entropy")
            values[name] = -(p[side] * logp[side]).sum(-1)
    return [values[name] for name in plan.names]


def _teacher_of(name: Divergence, sides: dict) -> str:
    return "given_teacher" if name.grad == "student" and "given_teacher" in sides else "teacher"


def _at(logp: Float[Tensor, "c V"], targets: Int[Tensor, " c"]) -> Float[Tensor, " c"]:
    """Log-prob of each target; −inf for an id beyond this side's vocabulary, which a model with more padded rows may sample."""
    last = logp.shape[-1] - 1
    return logp.gather(-1, targets.clamp(max=last)[:, None]).squeeze(-1).masked_fill(targets > last, -torch.inf)


def _is_plain(name: Divergence, teacher: Tensor, student: Tensor) -> bool:
    """Over one vocabulary and without options: done by hand here, the others by :mod:`pidistill.divergences`."""
    return name.top_k is None and name.entry_clip is None and teacher.shape == student.shape


def _divergence(name: Divergence, teacher: str, logp: dict[str, Tensor], p: dict[str, Tensor]) -> Float[Tensor, " c"]:
    logp_t, logp_s = logp[teacher], logp["student"]
    if not _is_plain(name, logp_t, logp_s):
        return divergence(name, *_cropped(logp_t, logp_s))
    beta = _beta(name)
    if beta in (0.0, 1.0):
        difference = logp_t - logp_s
        return (difference.mul_(p[teacher])).sum(-1) if beta == 0.0 else -(difference.mul_(p["student"])).sum(-1)
    log_mixture = _log_mixture(p[teacher], p["student"], beta)
    to_teacher = (logp_t - log_mixture).mul_(p[teacher]).sum(-1)
    to_student = torch.sub(logp_s, log_mixture, out=log_mixture).mul_(p["student"]).sum(-1)
    return beta * to_teacher + (1 - beta) * to_student


def _beta(name: Divergence) -> float:
    """The three divergences as one family: the generalised JSD, whose ends are the two KLs."""
    return {"kl_teacher_student": 0.0, "kl_student_teacher": 1.0}.get(name.name, name.beta)


def _log_mixture(teacher: Float[Tensor, "c V"], student: Float[Tensor, "c V"], beta: float) -> Float[Tensor, "c V"]:
    """log(β·T + (1−β)·S); where neither has mass, a finite number that multiplies 0."""
    return torch.lerp(student, teacher, beta).clamp_(min=torch.finfo(teacher.dtype).tiny).log_()


def _logits_to_gradients(
    plan: Plan,
    chunk: slice,
    logits: dict[str, Float[Tensor, "C _"]],
    normalisers: dict[str, Float[Tensor, "C 1"]],
    coefficients: Float[Tensor, "R C"],
    live: list[str],
) -> None:
    """Write ∂(Σ coefficient · number)/∂logits over the logits of the live sides."""
    names = [plan.names[row] for row in plan.rows_with_gradient]
    for block, targets in _blocks(plan, chunk, max(x.shape[1] for x in logits.values())):
        logp = {side: _scaled(x[block], plan.temperature) - normalisers[side][block] for side, x in logits.items()}
        p = {side: x.exp() for side, x in logp.items()}
        of_block = dict(zip(names, coefficients[:, block, None], strict=True))
        for side in live:
            terms = [
                (factor * coefficient, matrix)
                for name, coefficient in of_block.items()
                if isinstance(name, Divergence) and _reaches(name, side, logp)
                for factor, matrix in [_gradient(name, side, logp, p)]
            ]
            grad = _through_softmax(terms, of_block.get(f"{side}_logprobs"), targets, p[side])
            logits[side][block] = grad if plan.temperature == 1.0 else grad.div_(plan.temperature)


def _reaches(name: Divergence, side: str, sides: dict) -> bool:
    return name.grad in (side, "both") and side in ("student", _teacher_of(name, sides))


def _gradient(name: Divergence, side: str, logp: dict[str, Tensor], p: dict[str, Tensor]) -> tuple[float, Float[Tensor, "c V"]]:
    """(factor, matrix): their product is ∂divergence/∂log-probs of ``side``, up to a multiple of p that the softmax removes."""
    teacher = _teacher_of(name, logp)
    logp_t, logp_s = logp[teacher], logp["student"]
    if not _is_plain(name, logp_t, logp_s):
        return 1.0, _gradient_by_autograd(name, side, logp_t, logp_s)
    beta, other = _beta(name), teacher if side == "student" else "student"
    first = teacher if beta == 0.0 else "student"
    if beta in (0.0, 1.0) and side != first:
        return -1.0, p[other]
    if beta in (0.0, 1.0):
        return 1.0, (logp[side] - logp[other]).mul_(p[side])
    log_mixture = _log_mixture(p[teacher], p["student"], beta)
    share = beta if side == teacher else 1 - beta
    return share, torch.sub(logp[side], log_mixture, out=log_mixture).mul_(p[side])


def _gradient_by_autograd(name: Divergence, side: str, logp_t: Tensor, logp_s: Tensor) -> Float[Tensor, "c _"]:
    with torch.enable_grad():
        leaf = (logp_s if side == "student" else logp_t).clone().requires_grad_()
        sides = (logp_t, leaf) if side == "student" else (leaf, logp_s)
        total = divergence(name, *_cropped(*sides)).sum()
    return torch.autograd.grad(total, leaf)[0]


def _through_softmax(
    terms: list[tuple[Float[Tensor, "c 1"], Float[Tensor, "c V"]]],
    logprob: Float[Tensor, "c 1"] | None,
    targets: Int[Tensor, " c"],
    p: Float[Tensor, "c V"],
) -> Float[Tensor, "c V"]:
    """G − p · ΣG, G the sum of coefficient · matrix and, at the target, the coefficient of its log-prob."""
    grad, total = None, torch.zeros_like(p[:, :1])
    for coefficient, matrix in terms:
        grad = coefficient * matrix if grad is None else grad.addcmul_(coefficient, matrix)
        total += coefficient * matrix.sum(-1, keepdim=True)
    if logprob is None:
        return torch.zeros_like(p) if grad is None else grad.addcmul_(total, p, value=-1)
    last = p.shape[1] - 1
    logprob = logprob.masked_fill(targets[:, None] > last, 0.0)  # an id beyond the vocabulary: −inf whatever the logits
    total += logprob
    grad = -total * p if grad is None else grad.addcmul_(total, p, value=-1)
    return grad.scatter_add_(1, targets.clamp(max=last)[:, None], logprob)


# ---------------------------------------------------------------------------------------------- small pieces


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scaled(x: Float[Tensor, "c V"], temperature: float) -> Float[Tensor, "c V"]:
    """Softmax and divergences are in fp32 (float64 stays float64)."""
    x = _at_least_fp32(x)
    return x if temperature == 1.0 else x / temperature


def _cropped(*logps: Float[Tensor, "c _"]) -> list[Float[Tensor, "c V"]]:
    """Both sides over the ids that both have, renormalised; unchanged where they have the same."""
    size = min(logp.shape[-1] for logp in logps)
    return [logp if logp.shape[-1] == size else torch.log_softmax(logp[:, :size], dim=-1) for logp in logps]
