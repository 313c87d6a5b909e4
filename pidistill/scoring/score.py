"""Score both views of a batch with the model, up to per-token numbers.

``score`` returns log-probs of the sampled tokens, full-vocabulary divergences and entropies. The output head
(:mod:`pidistill.scoring.head`) is applied inside the model's own forward, where FSDP2 has its weight unsharded, to the hidden
states that predict policy tokens only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pidistill.errors import InputError
from pidistill.models.offloading import keep_on_device
from pidistill.models.precision import compute_dtype_of, own_wide_head
from pidistill.models.protocol import Decoder, balances_router, head_module, logit_cap, router_loss
from pidistill.scoring.equal_views import have_equal_weights, share_equal_views
from pidistill.scoring.head import ConstantPart, apply_head
from pidistill.scoring.head_numbers import ScorePlan
from pidistill.scoring.served_teacher import ServedTeacher, listed_of, with_served, without_served
from pidistill.scoring.tree_attention import read_trees
from pidistill.teachers import MixturePart, Teacher
from pidistill.types import Batch, BatchInputs, ModelInput, PerTokenLoss, ScoreRequest, Scores, ViewName


def score(
    model: Decoder,
    batch: Batch,
    request: ScoreRequest,
    *,
    temperature: float = 1.0,
    teacher: Teacher | Decoder | None = None,
    chunk_tokens: int | None = None,
    loss: PerTokenLoss | None = None,
) -> Scores:
    """Return per-token numbers of ``batch`` in both views, at the sampling temperature.

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
        chunk_tokens: tokens whose logits, in fp32, exist at once; by default as many as make 256 MiB over all sides.
        loss: the loss per token that the caller is about to make of the scores, from any slice of the batch; the head's
            gradients are then formed on the way, and each logit is computed once. It changes no result: where another loss is
            differentiated (up to one factor for all tokens), or none is given, the backward computes the logits again.

    Returns:
        ``Scores``, fp32. With gradient for the sides that the request names, where grad mode is on.
    """
    if not torch.is_grad_enabled():
        request = replace(request, student_grad=False, teacher_grad=False)
    if isinstance(teacher, ServedTeacher) and "teacher" in request.views:
        return _score_served(model, batch, request, teacher, temperature, chunk_tokens, loss)
    of_slice = None if loss is None else lambda part, scores: loss(batch.slice(part), scores)
    plan = ScorePlan(batch.targets, request, temperature, chunk_tokens, of_slice, logit_cap(model), batch.kept)
    with torch.set_grad_enabled(request.student_grad or request.teacher_grad):
        return _with_router(plan.as_scores(_score(plan, model, batch, _given_parts(teacher, model))), model)


def _score_served(
    model: Decoder,
    batch: Batch,
    request: ScoreRequest,
    teacher: ServedTeacher,
    temperature: float,
    chunk_tokens: int | None,
    loss: PerTokenLoss | None,
) -> Scores:
    """Return the student's numbers from the model, and the teacher's from what its server lists."""
    listed = listed_of(teacher, batch.views.rollouts, batch.targets.device, len(head_module(model).weight))
    numbers, request = listed.logprobs[:, 0], without_served(request, teacher)
    of_slice = None if loss is None else lambda part, scores: loss(batch.slice(part), with_served(scores, numbers[part]))
    plan = ScorePlan(batch.targets, request, temperature, chunk_tokens, of_slice, logit_cap(model), batch.kept, listed)
    with torch.set_grad_enabled(request.student_grad):
        return with_served(_with_router(plan.as_scores(_score(plan, model, batch, [])), model), numbers)


def _with_router(scores: Scores, model: Decoder) -> Scores:
    return replace(scores, router_loss=router_loss(model)) if router_loss(model) is not None else scores


def student_nll(batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
    """Return −log S: the supervised loss."""
    return -scores.student_logprobs


def _given_parts(teacher: Teacher | Decoder | None, model: Decoder) -> list[MixturePart]:
    """Return the parts of the given teacher; none where the trained model is the teacher."""
    if isinstance(teacher, nn.Module):
        return [MixturePart(1.0, teacher)]
    return [] if teacher is None or teacher.live else teacher.mixture(model)


@dataclass(frozen=True)
class Forwards:
    """Hold the forwards over a micro-batch that a request needs."""

    called: tuple[ViewName, ...]  # views that one forward of the trained model computes together, with the head inside it
    gradient: tuple[ViewName, ...]  # those of `called` that gradient flows back from
    constant: tuple[ViewName, ...]  # views that the trained model computes under `no_grad`, each in a forward of its own
    # The side that the parts of a given teacher compute, each in a forward of its own; None where there is none. A part that is
    # the trained model itself needs no forward where the teacher view is in `called`.
    given: Literal["teacher", "given_teacher"] | None


def list_forwards(request: ScoreRequest, *, live_teacher: bool) -> Forwards:
    """List the forwards of ``request``; ``live_teacher`` where the trained model itself is the teacher."""
    live = tuple(view for view in request.views if view == "student" or live_teacher or request.teacher_grad)
    has_gradient = {"student": request.student_grad, "teacher": request.teacher_grad}
    gradient = tuple(view for view in live if has_gradient[view])
    called = gradient or live
    given = None
    if not live_teacher and "teacher" in request.views:
        if "teacher" not in live:
            given = "teacher"
        elif any(divergence.grad == "student" for divergence in request.divergences):
            given = "given_teacher"  # beside the trained teacher view, only for terms with gradient to the student only
    return Forwards(called, gradient, tuple(view for view in live if view not in called), given)


def _score(plan: ScorePlan, model: Decoder, batch: Batch, parts: list[MixturePart]) -> Float[Tensor, "K N"]:
    """Compute constant sides first, under no_grad; then one forward of the model for the sides it trains, with the head inside.

    Both views in one call: under FSDP2 every layer is gathered once, and so is the head.
    """
    views, forwards = batch.views, list_forwards(plan.request, live_teacher=not parts)
    called = forwards.called
    device = batch.targets.device
    constants = {side: [_constant(MixturePart(1.0, model), views, side, device, model)] for side in forwards.constant}
    if forwards.given is not None:
        # What the live teacher view is about to compute anyway is not computed twice.
        ready = model if "teacher" in called else None
        shared = model if called else None
        constants[forwards.given] = [_constant(part, views, "teacher", device, shared, ready) for part in parts]
    if not called:
        return apply_head(plan, {}, constants["teacher"][0].weight, constants)

    equal = {side: [True] for side in forwards.constant}
    if forwards.given is not None:
        equal[forwards.given] = have_equal_weights(parts, model)

    def use(h: Float[Tensor, "M H"], weight: Tensor) -> Tensor:
        hidden = dict(zip(called, h.split([batch.targets.numel()] * len(called)), strict=True))
        share_equal_views(views, hidden, constants, equal)
        return apply_head(plan, hidden, weight, constants, own_wide_head(model, head_module(model)))

    return _forward(model, views.of(*called), use)


# ---------------------------------------------------------------------------------------------- the model up to the head


def _forward(model: Decoder, view: ModelInput, use: Callable[[Float[Tensor, "N H"], Tensor], Tensor]) -> Float[Tensor, "..."]:
    """Run ``use(normed hidden states that predict policy tokens, head weight)`` in place of the model's unembedding."""

    def unembed(h: Float[Tensor, "R L H"]) -> Tensor:
        with keep_on_device():
            return use(model.norm(h[view.rows, view.columns]), _local_weight(model))

    real = {"real": view.real} if balances_router(model) else {}
    if view.mask is None:
        with _unembedding(model, unembed, model.max_seq_len):
            return model(view.tokens, **real)
    read_trees(model)
    if view.depth > model.max_seq_len:
        raise InputError(
            f"a prompt with its completion has {view.depth} tokens, above the model's max_seq_len {model.max_seq_len}; raise "
            "model.max_seq_len, or drop long rows"
        )
    with _unembedding(model, unembed, max(model.max_seq_len, view.tokens.shape[1])):
        return model(view.tokens, mask=view.mask, input_pos=view.positions, **real)


@contextmanager
def _unembedding(model: Decoder, unembed: Callable[[Tensor], Tensor], max_seq_len: int) -> Iterator[None]:
    """Shadow ``model.unembed`` on the instance; torchtune and the state dict stay as they are.

    torchtune refuses rows longer than ``max_seq_len``; of a packed row it is the longest path that counts.
    """
    longest = model.max_seq_len
    model.unembed, model.max_seq_len = unembed, max_seq_len
    try:
        yield
    finally:
        del model.unembed
        model.max_seq_len = longest


def _local_weight(model: Decoder) -> Float[Tensor, "V H"]:
    weight = head_module(model).weight
    if isinstance(weight, DTensor):
        raise InputError(
            "the output head is sharded on its own, so its weight is not gathered in the model's forward; remove `output` and "
            "`tok_embeddings` from custom_sharded_layers"
        )
    return weight


@torch.no_grad()
def _constant(
    part: MixturePart,
    views: BatchInputs,
    side: ViewName,
    device: torch.device,
    shared: nn.Module | None,
    ready: nn.Module | None = None,
) -> ConstantPart:
    """Compute a part on a view that gets no gradient, on ``device``, the batch's; a part's weights may wait on the CPU.

    Under FSDP2 this is one more gathering of its layers, and of its head, unless that is the head of ``shared``, which is at
    hand in the forward to come. A part of ``ready`` needs no forward.
    """
    own, share = _rows_read(part, views, device)
    if part.module is ready and part.adapters:
        return ConstantPart(share, None, None)

    def read() -> Float[Tensor, "N H"]:
        with part.weights() as module:
            return _forward(module, own.of(side), lambda h, w: h)

    head, dtype = head_module(part.module).weight, compute_dtype_of(part.module)
    if part.memory is None:
        hidden = read()
    else:
        hidden = part.memory.of(own.rollouts, torch.empty(0, head.shape[1], dtype=dtype, device=device), read)
    if isinstance(share, Tensor):
        everywhere = hidden.new_zeros(len(share), hidden.shape[1])
        everywhere[share != 0] = hidden
        hidden = everywhere
    if part.module is shared:
        return ConstantPart(share, hidden, None)
    weight = own_wide_head(part.module, head_module(part.module))
    if weight is None:
        weight = head.detach().to(device, dtype)
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return ConstantPart(share, hidden, weight, logit_cap(part.module))


def _rows_read(part: MixturePart, views: BatchInputs, device: torch.device) -> tuple[BatchInputs, float | Float[Tensor, " N"]]:
    """Return what a part reads of a batch, and its share: one number, or one per policy token, 0 where it reads nothing.

    A part that reads no rollout here still runs a forward: under FSDP2 its layers are gathered on all ranks or on none.
    """
    if part.reads is None:
        return views, part.share
    reads = [part.reads(rollout) for rollout in views.rollouts]
    shares = [
        part.share * read for read, rollout in zip(reads, views.rollouts, strict=True) for _ in range(rollout.policy_tokens)
    ]
    return views.only([i for i, read in enumerate(reads) if read]), torch.tensor(shares, dtype=torch.float32, device=device)
