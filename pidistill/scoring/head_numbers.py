"""Compute the numbers of a chunk's tokens from its logits, and their gradients by hand, in log-prob space.

A number's gradient with respect to a side's log-probs is coefficient · matrix; through the softmax, a sum G of such terms
becomes (G − p · ΣG) / temperature. Logits are products (or capped ones), hence finite: no 0 · inf here.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pidistill.losses.divergences import divergence, listed_divergence
from pidistill.types import Divergence, KeptSets, ListedTeacher, ScoreRequest, Scores

# Elements of the logits of a chunk, over all sides that share the head. Larger ones make better use of the products, which read
# the whole head and its gradient for each chunk: 256 MiB of fp32.
CHUNK_ELEMENTS = {"cpu": 2**26, "cuda": 2**26}
# Elements of the rows whose numbers are computed at once, with about eight temporaries of that size. On CPU they stay in the
# cache, and are
# small enough that glibc does not return them to the system each time, which costs several times the arithmetic.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}

# How often a number may have been rounded before what is left of a difference counts as more than rounding.
_ROUNDINGS = 64

Name = str | Divergence  # "student_logprobs", "teacher_entropy" …, or the divergence asked for


@dataclass(frozen=True)
class ScorePlan:
    """Say what to compute of each token, and in which order the results are stacked.

    loss: the loss per token that the caller makes of the scores, for any slice of the tokens; None where it is not known yet.
    kept: the ids that the tokens were drawn from; None where the sampler recorded none.
    listed: what a teacher elsewhere says of the tokens; divergences are then to that, and no side here is the teacher's.
    cap: c where the trained model's logits are c·tanh(x / c) of the head's products x; None where they are the products.
    """

    targets: Int[Tensor, " N"]
    request: ScoreRequest
    temperature: float
    chunk_tokens: int | None
    loss: Callable[[slice, Scores], Float[Tensor, " C"]] | None = None
    cap: float | None = None
    kept: KeptSets | None = None
    listed: ListedTeacher | None = None

    @property
    def names(self) -> list[Name]:
        logprobs = [f"{view}_logprobs" for view in self.request.views]
        entropies = [f"{view}_entropy" for view in self.request.views if self.request.entropy]
        masses = [f"{view}_kept_mass" for view in self.request.views if self.kept is not None]
        return [*logprobs, *self.request.divergences, *entropies, *masses]

    @property
    def rows_with_gradient(self) -> list[int]:
        return [row for row, name in enumerate(self.names) if self._has_gradient(name)]

    def _has_gradient(self, name: Name) -> bool:
        if isinstance(name, Divergence):
            return name.grad != "none"
        side, _, number = name.partition("_")
        return number in ("logprobs", "kept_mass") and self.side_has_gradient(side)

    def side_has_gradient(self, side: str) -> bool:
        return {"student": self.request.student_grad, "teacher": self.request.teacher_grad}.get(side, False)

    def chunks(self, elements_per_token: int) -> Iterator[slice]:
        """Yield chunks of nearly equal size: a small last one would read the whole head for little."""
        tokens = self.targets.numel()
        most = self.chunk_tokens or max(1, CHUNK_ELEMENTS.get(self.targets.device.type, 2**26) // elements_per_token)
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
            student_kept_mass=named.get("student_kept_mass"),
            teacher_kept_mass=named.get("teacher_kept_mass"),
        )


def _blocks(plan: ScorePlan, chunk: slice, vocabulary: int) -> Iterator[tuple[slice, Int[Tensor, " c"]]]:
    """Yield the rows of a chunk that are looked at together, and their targets."""
    size = max(1, BLOCK_ELEMENTS.get(plan.targets.device.type, 2**25) // vocabulary)
    targets = plan.targets[chunk]
    for start in range(0, len(targets), size):
        block = slice(start, start + size)
        yield block, targets[block]


def _kept_of_block(plan: ScorePlan, chunk: slice, block: slice, size: int) -> dict[str, Int[Tensor, "c K"]]:
    first = chunk.start + block.start
    return {} if plan.kept is None else {view: plan.kept.rows(first, first + size, view) for view in plan.request.views}


def _listed_of_block(plan: ScorePlan, chunk: slice, block: slice, size: int) -> ListedTeacher | None:
    if plan.listed is None:
        return None
    rows = slice(chunk.start + block.start, chunk.start + block.start + size)
    return ListedTeacher(plan.listed.ids[rows], plan.listed.logprobs[rows])


def chunk_numbers(
    plan: ScorePlan, chunk: slice, logits: dict[str, Float[Tensor, "C _"]], numbers: Float[Tensor, "K N"]
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
        kept = _kept_of_block(plan, chunk, block, len(targets))
        listed = _listed_of_block(plan, chunk, block, len(targets))
        for row, value in enumerate(_block_numbers(plan, logp, targets, kept, listed)):
            out[row, block] = value
    return normalisers


def _block_numbers(
    plan: ScorePlan,
    logp: dict[str, Float[Tensor, "c _"]],
    targets: Int[Tensor, " c"],
    kept: dict[str, Int[Tensor, "c K"]],
    listed: ListedTeacher | None,
) -> list[Float[Tensor, " c"]]:
    p = {side: x.exp() for side, x in logp.items()}
    values: dict = {}
    for name in plan.names:
        if isinstance(name, Divergence):
            # Requests that differ only in their gradient are one number, unless their teachers differ.
            teacher = _teacher_of(name, logp)
            key = (replace(name, grad="none"), teacher)
            if key not in values:
                values[key] = _divergence(key[0], teacher, logp, p) if listed is None else _to_listed(key[0], listed, logp)
            values[name] = values[key]
        elif name.endswith("_logprobs"):
            values[name] = _at(logp[name.removesuffix("_logprobs")], targets)
        elif name.endswith("_kept_mass"):
            side = name.removesuffix("_kept_mass")
            values[name] = _kept_mass(logp[side], kept[side])[0]
        else:
            side = name.removesuffix("_entropy")
            values[name] = -(p[side] * logp[side]).sum(-1)
    return [values[name] for name in plan.names]


def _teacher_of(name: Divergence, sides: dict) -> str:
    return "given_teacher" if name.grad == "student" and "given_teacher" in sides else "teacher"


def _at(logp: Float[Tensor, "c V"], targets: Int[Tensor, " c"]) -> Float[Tensor, " c"]:
    """Return the log-prob of each target; −inf for an id beyond this side's vocabulary, which a padded model may sample."""
    last = logp.shape[-1] - 1
    return logp.gather(-1, targets.clamp(max=last)[:, None]).squeeze(-1).masked_fill(targets > last, -torch.inf)


def _kept_mass(logp: Float[Tensor, "c V"], kept: Int[Tensor, "c K"]) -> tuple[Float[Tensor, " c"], Float[Tensor, "c V"]]:
    """Return log Σ p over the kept ids of each row, and its gradient, the distribution on them. No ids stand for all: 0."""
    last = logp.shape[-1] - 1
    known = (kept >= 0) & (kept <= last)
    inside = logp.gather(-1, kept.clamp(0, last)).masked_fill(~known, -torch.inf)
    whole = ~(kept >= 0).any(-1)
    mass = torch.logsumexp(inside, -1) if kept.shape[1] else logp.new_zeros(len(logp))
    mass = mass.masked_fill(whole, 0.0)
    shares = (inside - mass[:, None]).exp()
    return mass, torch.zeros_like(logp).scatter_add_(1, kept.clamp(0, last), shares)


def _is_plain(name: Divergence, teacher: Tensor, student: Tensor) -> bool:
    """Return whether it is over one vocabulary and without options: done by hand here, others in `losses.divergences`."""
    return name.fn is None and name.top_k is None and name.entry_clip is None and teacher.shape == student.shape


def _divergence(name: Divergence, teacher: str, logp: dict[str, Tensor], p: dict[str, Tensor]) -> Float[Tensor, " c"]:
    logp_t, logp_s = logp[teacher], logp["student"]
    if not _is_plain(name, logp_t, logp_s):
        return divergence(name, *_cropped(logp_t, logp_s))
    beta = _beta(name)
    if beta in (0.0, 1.0):
        difference = logp_t - logp_s
        return (difference.mul_(p[teacher])).sum(-1) if beta == 0.0 else -(difference.mul_(p["student"])).sum(-1)
    mixture = _mixture(p["student"], p[teacher], beta)
    to_teacher = _log_ratio(p[teacher], mixture).mul_(p[teacher]).sum(-1)
    to_student = _log_ratio(p["student"], mixture).mul_(p["student"]).sum(-1)
    return beta * to_teacher + (1 - beta) * to_student


def _to_listed(name: Divergence, listed: ListedTeacher, logp: dict[str, Tensor]) -> Float[Tensor, " c"]:
    return listed_divergence(name, listed.ids, listed.logprobs, logp["student"])


def _beta(name: Divergence) -> float:
    """Return the β of the three divergences as one family, the generalised JSD, whose ends are the two KLs."""
    return {"kl_teacher_student": 0.0, "kl_student_teacher": 1.0}.get(name.name, name.beta)


def _mixture(p: Float[Tensor, "c V"], q: Float[Tensor, "c V"], share: float) -> Float[Tensor, "c V"]:
    """Return (1 − share)·p + share·q, at least the smallest normal number: p itself where both are equal."""
    return torch.lerp(p, q, share).clamp_(min=torch.finfo(p.dtype).tiny)


def _log_ratio(p: Float[Tensor, "c V"], mixture: Float[Tensor, "c V"]) -> Float[Tensor, "c V"]:
    """Return log p − log mixture: exactly 0 where they are equal, and finite where p has no mass."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).div_(mixture).log_()


def logits_to_gradients(
    plan: ScorePlan,
    chunk: slice,
    logits: dict[str, Float[Tensor, "C _"]],
    normalisers: dict[str, Float[Tensor, "C 1"]],
    coefficients: Float[Tensor, "R C"],
    live: list[str],
) -> None:
    """Write ∂(Σ coefficient · number)/∂(products of the head) over the logits of the live sides, through their cap."""
    names = [plan.names[row] for row in plan.rows_with_gradient]
    for block, targets in _blocks(plan, chunk, max(x.shape[1] for x in logits.values())):
        logp = {side: _scaled(x[block], plan.temperature) - normalisers[side][block] for side, x in logits.items()}
        p = {side: x.exp() for side, x in logp.items()}
        of_block = dict(zip(names, coefficients[:, block, None], strict=True))
        listed = _listed_of_block(plan, chunk, block, len(targets))
        for side in live:
            terms = [
                (factor * coefficient, matrix)
                for name, coefficient in of_block.items()
                if isinstance(name, Divergence) and _reaches(name, side, logp)
                for factor, matrix in [_gradient(name, side, logp, p, listed)]
            ]
            if (mass := of_block.get(f"{side}_kept_mass")) is not None:
                kept = _kept_of_block(plan, chunk, block, len(targets))
                terms.append((mass, _kept_mass(logp[side], kept[side])[1]))
            grad = _through_softmax(terms, of_block.get(f"{side}_logprobs"), targets, p[side])
            if plan.cap is not None:
                grad.mul_(1 - (logits[side][block] / plan.cap).square())  # the slope of c·tanh(x / c), from its value
            logits[side][block] = grad if plan.temperature == 1.0 else grad.div_(plan.temperature)


def _reaches(name: Divergence, side: str, sides: dict) -> bool:
    return name.grad in (side, "both") and side in ("student", _teacher_of(name, sides))


def _gradient(
    name: Divergence, side: str, logp: dict[str, Tensor], p: dict[str, Tensor], listed: ListedTeacher | None
) -> tuple[float, Float[Tensor, "c V"]]:
    """Return (factor, matrix): the product is ∂divergence/∂log-probs of ``side`` but for a multiple of p."""
    if listed is not None:
        return 1.0, _gradient_to_listed(name, listed, logp["student"])
    teacher = _teacher_of(name, logp)
    logp_t, logp_s = logp[teacher], logp["student"]
    if not _is_plain(name, logp_t, logp_s):
        return 1.0, _gradient_by_autograd(name, side, logp_t, logp_s)
    beta, other = _beta(name), teacher if side == "student" else "student"
    first = teacher if beta == 0.0 else "student"
    if beta in (0.0, 1.0) and side != first:
        # −p[other] alone is the same gradient after the softmax, but rounding noise instead of 0 where both sides are equal.
        return 1.0, p[side] - p[other]
    if beta in (0.0, 1.0):
        return 1.0, (logp[side] - logp[other]).mul_(p[side])
    mixture = _mixture(p["student"], p[teacher], beta)
    share = beta if side == teacher else 1 - beta
    return share, _log_ratio(p[side], mixture).mul_(p[side])


def _gradient_by_autograd(name: Divergence, side: str, logp_t: Tensor, logp_s: Tensor) -> Float[Tensor, "c _"]:
    with torch.enable_grad():
        leaf = (logp_s if side == "student" else logp_t).clone().requires_grad_()
        sides = (logp_t, leaf) if side == "student" else (leaf, logp_s)
        total = divergence(name, *_cropped(*sides)).sum()
    (grad,) = torch.autograd.grad(total, leaf)
    return grad if name.fn is None or logp_t.shape != logp_s.shape else _without_noise(grad, logp_t, logp_s)


def _gradient_to_listed(name: Divergence, listed: ListedTeacher, logp_s: Float[Tensor, "c V"]) -> Float[Tensor, "c V"]:
    with torch.enable_grad():
        leaf = logp_s.clone().requires_grad_()
        total = _to_listed(name, listed, {"student": leaf}).sum()
    return torch.autograd.grad(total, leaf)[0]


def _without_noise(
    grad: Float[Tensor, "c V"], logp_t: Float[Tensor, "c V"], logp_s: Float[Tensor, "c V"]
) -> Float[Tensor, "c V"]:
    """Set the gradient of a divergence of one's own to 0 on rows whose two sides are equal, where rounding alone is left of it.

    The formulas of this package are written so that it is 0 there. A function of the user's need not be, and an optimiser such
    as AdamW would turn the noise into steps of full size.
    """
    p, total = logp_s.exp(), grad.sum(-1, keepdim=True)
    noise = _ROUNDINGS * torch.finfo(grad.dtype).eps * (grad.abs() + p * total.abs())
    only_noise = ((grad - p * total).abs() <= noise).all(-1, keepdim=True)
    return grad.masked_fill(only_noise & (logp_t == logp_s).all(-1, keepdim=True), 0.0)


def _through_softmax(
    terms: list[tuple[Float[Tensor, "c 1"], Float[Tensor, "c V"]]],
    logprob: Float[Tensor, "c 1"] | None,
    targets: Int[Tensor, " c"],
    p: Float[Tensor, "c V"],
) -> Float[Tensor, "c V"]:
    """Return G − p · ΣG, G the sum of coefficient · matrix and, at the target, the coefficient of its log-prob."""
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


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def cap_logits(x: Float[Tensor, "M V"], cap: float | None) -> Float[Tensor, "M V"]:
    """Return c·tanh(x / c), written over x; x where there is no cap."""
    return x if cap is None else x.div_(cap).tanh_().mul_(cap)


def _scaled(x: Float[Tensor, "c V"], temperature: float) -> Float[Tensor, "c V"]:
    """Return x / temperature in fp32, where softmax and divergences are computed; float64 stays float64."""
    x = at_least_fp32(x)
    return x if temperature == 1.0 else x / temperature


def _cropped(*logps: Float[Tensor, "c _"]) -> list[Float[Tensor, "c V"]]:
    """Return both sides over the ids that both have, renormalised; unchanged where they have the same."""
    size = min(logp.shape[-1] for logp in logps)
    return [logp if logp.shape[-1] == size else torch.log_softmax(logp[:, :size], dim=-1) for logp in logps]
