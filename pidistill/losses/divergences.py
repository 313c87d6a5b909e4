"""Compute divergences between two next-token distributions: nats, one number per token, never reduced or clamped at 0.

Every function takes log-probs (the log-softmax of logits already divided by the temperature; no T² factor follows) and names
its divergence by its arguments: ``kl(logp, logq)`` is KL(p||q). A clamp at 0 would kill the gradient of tokens whose KL rounds
below it; rounding alone keeps KL ≥ −1e-5 in fp32 and ≥ −1e-12 in fp64.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pidistill.errors import InputError, check_choice, check_share
from pidistill.types import Divergence


def kl(
    logp: Float[Tensor, "*tokens V"], logq: Float[Tensor, "*tokens V"], entry_clip: float | None = None
) -> Float[Tensor, "*tokens"]:
    """Return KL(p||q) = Σ_v p_v·(log p_v − log q_v) per token, in nats.

    It is computed as Σ_v [p_v·(log p_v − log q_v) − p_v + q_v]: the added masses sum to 0 for distributions and change neither
    the value nor the gradient that reaches logits through a softmax. With them the gradient is 0 exactly, entry by entry, where
    p and q are equal. Without them it is rounding noise, and an optimiser such as AdamW turns noise into steps of full size.

    Gradient reaches whichever side requires it: ∂/∂log p_v = p_v·(log p_v − log q_v), ∂/∂log q_v = q_v − p_v. Entries with
    p_v = 0 (log-prob −inf, or too small for the dtype) give log p_v a zero gradient. Where q_v = 0 < p_v the value is +inf.

    Args:
        entry_clip: upper bound of each vocabulary entry's p_v·(log p_v − log q_v) before the sum (a later revision of
            arXiv 2601.18734 uses .05). A clipped term has no gradient. Negative terms stay, so the result may be negative.

    Raises:
        InputError: log-probs below fp32: a bfloat16 log-prob near −20 is off by up to 0.06 nats.
    """
    _require_fp32(logp, logq)
    p = logp.exp()
    # The ratio is masked, not the product: 0·inf in the product would come back as NaN in the gradient.
    terms = p * (logp - logq).masked_fill(p == 0, 0.0)
    if entry_clip is not None:
        terms = terms.clamp(max=entry_clip)
    return (terms + (logq.exp() - p)).sum(-1)


def generalised_jsd(
    teacher_logp: Float[Tensor, "*tokens V"], student_logp: Float[Tensor, "*tokens V"], beta: float
) -> Float[Tensor, "*tokens"]:
    """Return β·KL(T||M) + (1−β)·KL(S||M), M = β·T + (1−β)·S; the endpoints are defined as KL(T||S) (β=0) and KL(S||T) (β=1).

    The convention of arXiv 2306.13649 (Eq. 1) as TRL implements it. In between, the value lies in [0, −β·ln β − (1−β)·ln(1−β)].

    **Near the endpoints** the interior does not approach them: it tends to β·KL(T||S) as β→0 and to (1−β)·KL(S||T) as β→1, so
    β = .01 has about a hundredth of the gradient of β = 0. Use the endpoint itself, or a β well inside (0.1 to 0.9).

    Gradient reaches both sides where they require it, through M too.

    Raises:
        InputError: β outside [0, 1]; log-probs below fp32.
    """
    check_share("beta", beta, "the weight of the teacher in the mixture of the generalised JSD")
    if beta == 0.0:
        return kl(teacher_logp, student_logp)
    if beta == 1.0:
        return kl(student_logp, teacher_logp)
    # logaddexp(−inf, −inf) has a NaN gradient. Such an entry has no mass in T or S, so that its log M is never read.
    impossible = teacher_logp.isneginf() & student_logp.isneginf()
    weighted_student = student_logp.masked_fill(impossible, 0.0) + math.log1p(-beta)
    mixture_logp = torch.logaddexp(teacher_logp + math.log(beta), weighted_student)
    # Where T and S are equal, so is M to the bit, and the gradient is 0. The KLs below send no gradient to M in such an entry.
    mixture_logp = torch.where(teacher_logp == student_logp, teacher_logp, mixture_logp)
    return beta * kl(teacher_logp, mixture_logp) + (1 - beta) * kl(student_logp, mixture_logp)


def entropy(logp: Float[Tensor, "*tokens V"]) -> Float[Tensor, "*tokens"]:
    """Return −Σ_v p_v·log p_v per token, in nats, in [0, ln V]; entries with p_v = 0 add 0, with a zero gradient."""
    _require_fp32(logp)
    p = logp.exp()
    return -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)


def kl_topk_with_tail(
    logp: Float[Tensor, "*tokens V"], logq: Float[Tensor, "*tokens V"], top: int | Int[Tensor, "*tokens K"]
) -> Float[Tensor, "*tokens"]:
    """Return KL(p||q) after merging all but K tokens into one tail bucket: an exact (K+1)-way divergence.

    At most the full KL (merging loses information), equal to it for K = V. Gradient reaches both sides, tail included.

    Args:
        top: K for the K most probable tokens of p, or their ids [.., K], distinct per row (SDPO, arXiv 2601.20802, takes the
            student's top-k whichever side comes first).
    """
    if isinstance(top, int):
        if not 1 <= top <= logp.shape[-1]:
            raise InputError(f"top-k needs 1 <= k <= vocabulary size {logp.shape[-1]}, not {top}")
        top = logp.detach().topk(top, dim=-1).indices
    return kl(with_tail(logp, top), with_tail(logq, top))


def with_tail(logp: Float[Tensor, "*tokens V"], ids: Int[Tensor, "*tokens K"]) -> Float[Tensor, "*tokens K+1"]:
    """Return the log-probs of ``ids`` [.., K], then the log of all remaining mass: a (K+1)-way distribution.

    The tail is summed over the other V − K entries rather than taken as 1 − (the K), so that a tail of 1e-30 is still exact.
    Gradient reaches all V entries. ``ids`` must be distinct per row; a repeated id would count twice. An id outside the
    vocabulary, such as the -1 of a row that lists fewer, has no mass.
    """
    _require_fp32(logp)
    size = logp.shape[-1]
    known = (ids >= 0) & (ids < size)
    # One column more takes the ids that are no entry.
    merged = torch.ones(*logp.shape[:-1], size + 1, dtype=torch.bool, device=logp.device)
    merged = merged.scatter_(-1, ids.where(known, size), False)[..., :size]
    # logsumexp has a NaN gradient where nothing is left: K = V, or all V − K others have probability 0.
    rest = logp.masked_fill(~merged, -math.inf)
    empty = rest.detach().amax(-1, keepdim=True).isneginf()
    tail = rest.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)
    listed = logp.gather(-1, ids.clamp(0, size - 1)).masked_fill(~known, -math.inf)
    return torch.cat([listed, tail], dim=-1)


# What rounding leaves of a tail that is 1 − (the listed mass), where the log-probs were rounded to fp32.
LEAST_TAIL = 1e-6


def listed_with_tail(
    listed_logp: Float[Tensor, "*tokens K"], ids: Int[Tensor, "*tokens K"], vocabulary: int
) -> Float[Tensor, "*tokens K+1"]:
    """Return the distribution of :func:`with_tail` from the log-probs of ``ids`` alone: the tail is what they leave of 1.

    A tail below 1e-6 counts as 1e-6, since rounding leaves no more of it; it is 0 where all ids are listed. Mass on listed ids
    beyond ``vocabulary`` is taken out and the rest renormalised, as divergences of two vocabularies are. Computed in float64;
    without gradient.
    """
    known, p = (ids >= 0) & (ids < vocabulary), listed_logp.detach().double().exp()
    beyond = p.masked_fill(ids < vocabulary, 0.0).sum(-1, keepdim=True)
    p = p.masked_fill(~known, 0.0)
    tail = (1.0 - beyond - p.sum(-1, keepdim=True)).clamp(min=LEAST_TAIL)
    p = torch.cat([p, tail.masked_fill(known.sum(-1, keepdim=True) == vocabulary, 0.0)], dim=-1)
    return (p / p.sum(-1, keepdim=True)).log().to(listed_logp.dtype)


NAMES = ("kl_teacher_student", "kl_student_teacher", "jsd")


def divergence(
    request: Divergence, teacher_logp: Float[Tensor, "*tokens V"], student_logp: Float[Tensor, "*tokens V"]
) -> Float[Tensor, "*tokens"]:
    """Return the divergence that ``request`` names, with gradient to the side(s) that ``request.grad`` names and no other.

    ``kl_teacher_student`` is KL(T||S), ``kl_student_teacher`` KL(S||T), ``jsd`` the generalised JSD with ``request.beta``. With
    ``top_k`` it is that of the (K+1)-way distributions of :func:`with_tail` over the student's K most probable tokens, a choice
    without gradient; ``entry_clip`` then bounds each of the K+1 terms. ``fn`` takes the place of the named formulas.
    """
    check_divergence(request)
    teacher = teacher_logp if request.grad in ("teacher", "both") else teacher_logp.detach()
    student = student_logp if request.grad in ("student", "both") else student_logp.detach()
    if request.top_k is not None:
        if request.top_k > student.shape[-1]:
            raise InputError(
                f"divergence {request.name}: top_k={request.top_k} is more than the vocabulary's {student.shape[-1]} ids; "
                "lower it, or leave it out for the full-vocabulary divergence"
            )
        ids = student.detach().topk(request.top_k, dim=-1).indices
        teacher, student = with_tail(teacher, ids), with_tail(student, ids)
    return _value(request, teacher, student)


def listed_divergence(
    request: Divergence,
    ids: Int[Tensor, "*tokens K"],
    teacher_logp: Float[Tensor, "*tokens K"],
    student_logp: Float[Tensor, "*tokens V"],
) -> Float[Tensor, "*tokens"]:
    """Return the divergence that ``request`` names from a teacher of whom the log-probs of ``ids`` [.., K] alone are known.

    It is that of two (K+1)-way distributions, all other ids merged into one tail; -1 stands behind the last id of a row. Both
    KLs and the JSD are at most those over the full vocabulary (merging loses information), and equal to them where all ids
    are listed. Gradient reaches the student alone, tail included.
    """
    check_divergence(request)
    student = student_logp if request.grad == "student" else student_logp.detach()
    teacher = listed_with_tail(teacher_logp, ids, student.shape[-1]).to(student.dtype)
    return _value(request, teacher, with_tail(student, ids))


def _value(
    request: Divergence, teacher: Float[Tensor, "*tokens V"], student: Float[Tensor, "*tokens V"]
) -> Float[Tensor, "*tokens"]:
    if request.fn is not None:
        return _own_value(request, teacher, student)
    if request.name == "jsd":
        return generalised_jsd(teacher, student, request.beta)
    p, q = (teacher, student) if request.name == "kl_teacher_student" else (student, teacher)
    return kl(p, q, request.entry_clip)


def check_divergence(request: Divergence) -> None:
    """Refuse an unknown name or side, and options that the named divergence does not have."""
    if request.fn is None and request.name not in NAMES:
        raise InputError(
            f"unknown divergence {request.name!r}; choose kl_teacher_student, kl_student_teacher or jsd, or give the dotted "
            "path of a function of your own"
        )
    if request.fn is not None and (request.name in NAMES or request.entry_clip is not None):
        raise InputError(
            f"divergence {request.name}: a function of one's own needs a name of its own, and no "
            f"entry_clip={request.entry_clip}, which bounds the terms of a KL"
        )
    check_choice(f"divergence {request.name}: grad", request.grad, ("student", "teacher", "both", "none"))
    if (request.beta is not None) != (request.name == "jsd"):
        raise InputError(
            f"divergence {request.name}: beta={request.beta}, but jsd needs a beta and no other divergence takes one"
        )
    if request.entry_clip is not None and request.name == "jsd":
        raise InputError(f"divergence jsd: entry_clip={request.entry_clip} bounds the terms of a KL; remove it, or choose a KL")
    if request.entry_clip is not None and not request.entry_clip > 0:
        raise InputError(
            f"divergence {request.name}: entry_clip={request.entry_clip} must be above 0; at most 0 nothing is left"
        )
    if request.top_k is not None and request.top_k < 1:
        raise InputError(f"divergence {request.name}: top_k={request.top_k} must be at least 1")


def _own_value(
    request: Divergence, teacher: Float[Tensor, "*tokens V"], student: Float[Tensor, "*tokens V"]
) -> Float[Tensor, "*tokens"]:
    value = request.fn(teacher, student)
    if not isinstance(value, Tensor) or value.shape != teacher.shape[:-1]:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"divergence {request.name}: its function gave a result of {got} for log-probs of shape {list(teacher.shape)}; it "
            f"must give one number per token, shape {list(teacher.shape[:-1])} (sum over the last dimension only)"
        )
    return value


def _require_fp32(*logps: Tensor) -> None:
    for logp in logps:
        if logp.dtype not in (torch.float32, torch.float64):
            raise InputError(f"log-probs are {logp.dtype}: take the log-softmax of logits.float(), divergences need fp32")
