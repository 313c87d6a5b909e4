"""Sample from any torchtune decoder, sharded or not, without changing it.

`torchtune.generation.generate` keeps every logit of every step, runs until the last row stops and gives no log-probs. This
loop keeps one step's logits at a time, records the log-prob of each token under the distribution it was drawn from, and forces
the observations of multi-turn episodes between the sampled turns.

Every row has its own length. Each step reads one token of every row that has one: finished rows have left, and the next ones
of the queue have entered. A prompt is read once for its group, an observation in one forward of its own; a row that waits for
its environment keeps its keys and values while the others continue.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from pidistill.distributed.tensor_parallel import in_lockstep, tensor_parallel_group
from pidistill.models.protocol import Decoder
from pidistill.rollouts.base import OnTurnEnd, Sample
from pidistill.rollouts.decoding import Context, decoding, evaluating, find_window, gathered_parameters, of_like_length
from pidistill.rollouts.distribution import draw, sampling_logprobs
from pidistill.rollouts.progress import count
from pidistill.rollouts.request import (
    Request,
    check_request,
    check_settings,
    check_truncation,
    collect_answers,
    end_turn,
    not_finite,
)

# New rows enter once this share of the batch is free: a prompt then is read for several rows of its group at once.
_ENTER_AT_FRAC = 0.25


@dataclass(kw_only=True)
class TorchtuneSampler:
    """Sample with torchtune's modules, the default; see :class:`pidistill.rollouts.base.Sampler` for what `sample` promises.

    Attributes:
        max_new_tokens: sampled and forced tokens of one completion, together.
        temperature: divides the logits; 0 is greedy, whose log-probs are 0.0 (a point mass): for evaluation only.
        top_k: keep the k most probable tokens, and those tied with the last of them; null keeps all.
        top_p: keep the fewest most probable tokens that together reach this probability, after temperature and top_k; null
            keeps all. Either one makes the sampling distribution differ from the one that is trained.
        max_turn_tokens: sampled tokens of one turn, null for no limit but ``max_new_tokens``. A turn that reaches it without a
            stop token ends the episode: its environment judges it as truncated, and it is counted as
            ``turn_truncated_frac``. An end that is forced would stand in the context as if the policy had meant it.
        max_batch_size: rows that are sampled at once, the others wait until some have ended; null is all. Less needs less
            memory for keys and values.
        record_kept: with top_k or top_p, record which ids were left when each token was drawn. The trainer then replays them:
            its ratios are of the same truncated distribution, 1 at the first update, and its gradient is that policy's own.
            Costs memory for the ids, so bound them with top_k.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    max_batch_size: int | None = None
    max_turn_tokens: int | None = None
    record_kept: bool = False

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.max_new_tokens)
        check_truncation(self.top_p, top_k=self.top_k, max_batch_size=self.max_batch_size, max_turn_tokens=self.max_turn_tokens)

    @staticmethod
    def find_length_limit(settings: Mapping[str, Any], model: Decoder) -> tuple[int, str] | None:
        """Return the most tokens of a prompt and its completion, and what sets them; None for the model's own."""
        most = find_window(model)
        what = "the model's sliding window, beyond which pidistill.rollouts.TorchtuneSampler cannot sample,"
        return None if most is None or most >= model.max_seq_len else (most, what)

    def sample(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        seeds: Sequence[int],
        stop_ids: frozenset[int],
        pad_id: int,
        on_turn_end: OnTurnEnd,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Sample]:
        """Sample ``group_size`` completions of every prompt, in eval mode and without gradient.

        With a sharded model every rank must call this, with any number of prompts, none included: the parameters are gathered
        once at the start, after which each rank samples as long as it needs. Ranks that share its matrices (tensor parallelism)
        call this with the same arguments: the first one samples, and the samples of the others are empty.

        A row's tokens depend on its prompt and seed, not on its batch; only where a draw falls within rounding error of
        the border between two tokens can another batch decide otherwise (about 1e-7 per token in fp32, more in bf16).
        """
        request = Request(
            temperature=self.temperature if temperature is None else temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            stop_ids=stop_ids,
            pad_id=pad_id,
            max_turn_tokens=self.max_turn_tokens,
            on_turn_end=on_turn_end,
            vocab_size=model.tok_embeddings.num_embeddings,
        )
        check_request(model, prompts, group_size, seeds, request)
        rows = [_Row(r, r // group_size, seed) for r, seed in enumerate(seeds)]
        if self.record_kept and (self.top_k is not None or self.top_p is not None):
            for row in rows:
                row.sample.kept = []
        # Not inference_mode: parameters gathered in it could not be trained afterwards.
        with torch.no_grad(), gathered_parameters(model), evaluating(model):
            _sample_rows(model, prompts, rows, request, self.max_batch_size or len(rows))
        return [row.sample for row in rows]


# ---------------------------------------------------------------------------------------------- rows


@dataclass
class _Row:
    """Hold one completion while it is sampled."""

    index: int  # its number among all rows
    prompt: int  # which prompt it answers
    seed: int
    sample: Sample = field(default_factory=lambda: Sample([], [], [], ""))
    unread: list[int] = field(default_factory=list)  # ids that the model has not read yet; never empty between steps
    turn_start: int = 0  # where the current turn begins in `sample.tokens`
    answer: Future | None = None  # what is awaited from `on_turn_end`; None while nothing is

    @property
    def finished(self) -> bool:
        return self.sample.stop_reason != ""

    @property
    def to_read(self) -> int:
        """Return how many ids the model is to read next: none where the row has finished or waits."""
        return 0 if self.finished or self.answer is not None else len(self.unread)

    def draw_uniforms(self, n: int) -> None:
        """Draw from the row's own stream: token t of the completion, if sampled, is decided by number t of it."""
        self._uniforms = torch.rand(n, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64).numpy()

    @property
    def uniform(self) -> float:
        return self._uniforms[len(self.sample.tokens)]

    def append(self, ids: Sequence[int], *, sampled: bool, logprobs: Sequence[float]) -> None:
        self.sample.tokens += ids
        self.sample.policy_mask += [sampled] * len(ids)
        self.sample.logprobs += logprobs
        self.unread += ids

    def read(self) -> list[int]:
        """Return what the model has not read yet, and is about to."""
        ids, self.unread = self.unread, []
        return ids


def _sample_rows(model: Decoder, prompts: Sequence[Sequence[int]], rows: list[_Row], request: Request, size: int) -> None:
    """Sample the rows to their ends, at most ``size`` at once."""
    queue, rows = deque(rows), []
    longest = max(map(len, prompts), default=0)
    group, columns = tensor_parallel_group(model), longest + request.max_new_tokens
    with decoding(model, columns, request.pad_id) as own, in_lockstep(own, group) as context:
        while context is not None and (queue or rows):
            collect_answers(rows, request)
            rows = _going_on(rows, context)
            context.reserve(min(size, len(rows) + len(queue)))
            _advance(rows, context, request)
            rows += _begin(queue, size, len(rows), prompts, context, request)


def _going_on(rows: list[_Row], context: Context) -> list[_Row]:
    """Drop finished rows, and put those with one token to read first, so that a step reads its part of the cache in place."""
    one = [slot for slot, row in enumerate(rows) if row.to_read == 1]
    others = [slot for slot, row in enumerate(rows) if not row.finished and row.to_read != 1]
    order = _few_moves(one, 0) + _few_moves(others, len(one))
    context.rearrange(order)
    count(rows=len(rows) - len(order))
    return [rows[slot] for slot in order]


def _few_moves(slots: list[int], first: int) -> list[int]:
    """Return the slots in the order for places ``first``, ``first + 1`` …, each in its own place if that is among them."""
    places = range(first, first + len(slots))
    staying = set(slots) & set(places)
    moving = iter([slot for slot in slots if slot not in staying])
    return [place if place in staying else next(moving) for place in places]


def _advance(rows: list[_Row], context: Context, request: Request) -> None:
    """Let every row that has something to read read all of it, and sample its next token."""
    one = [slot for slot, row in enumerate(rows) if row.to_read == 1]
    several = [slot for slot, row in enumerate(rows) if row.to_read > 1]
    together = of_like_length([rows[slot].to_read for slot in several])
    for slots in (one, *([several[i] for i in chunk] for chunk in together)):
        if slots:
            due = [rows[slot] for slot in slots]
            _draw(context.read(slots, [row.read() for row in due]), due, request)


def _begin(
    queue: deque[_Row], size: int, taken: int, prompts: Sequence[Sequence[int]], context: Context, request: Request
) -> list[_Row]:
    """Return the rows that enter now, with their first token; each prompt is read once, whatever the size of its group."""
    free = size - taken
    if not queue or (taken and free < max(1, _ENTER_AT_FRAC * size)):
        return []
    rows = [queue.popleft() for _ in range(min(free, len(queue)))]
    used = sorted({row.prompt for row in rows})
    prompt_of = [used.index(row.prompt) for row in rows]
    for row in rows:
        row.draw_uniforms(request.max_new_tokens)
    logits = context.read_prompts([prompts[prompt] for prompt in used], prompt_of)
    _draw(logits[prompt_of], rows, request)
    return rows


def _draw(logits: Float[Tensor, "B V"], rows: list[_Row], request: Request) -> None:
    """Give each row its next token, and what follows from it. ``logits`` is overwritten."""
    ids, logprobs, kept = _choose(logits, rows, request)
    # In one tensor, since each transfer from a GPU waits for the device. float64 holds every id.
    ids, logprobs = torch.stack([ids.double(), logprobs]).tolist()
    _check_finite(logprobs, rows)
    count(tokens=len(rows))
    for n, (row, token, logprob) in enumerate(zip(rows, map(int, ids), logprobs, strict=True)):
        row.append([token], sampled=True, logprobs=[logprob])
        if row.sample.kept is not None:
            row.sample.kept.append(None if kept is None else kept[n])
        if token in request.stop_ids:
            end_turn(row, request)
        elif len(row.sample.tokens) == request.max_new_tokens:
            row.sample.stop_reason = "length"
        elif len(row.sample.tokens) - row.turn_start == request.max_turn_tokens:
            row.sample.stop_reason = "turn_length"


def _choose(
    logits: Float[Tensor, "B V"], rows: list[_Row], request: Request
) -> tuple[Int[Tensor, " B"], Float64[Tensor, " B"], list[list[int] | None] | None]:
    """Draw one token per row, and return its log-prob under the distribution it is drawn from; not finite if a logit is not.

    Where rows record them, also the ids that were left to draw from: None in a row from which nothing was cut.
    """
    kept = None
    if request.temperature == 0:
        best, ids = logits.max(dim=-1)
        return ids, (best - best).double(), kept
    if request.top_k is None and request.top_p is None:
        scores = logits if request.temperature == 1 else logits.div_(request.temperature)
    else:
        scores = sampling_logprobs(logits, request.temperature, request.top_k, request.top_p)
        kept = _kept_ids(scores) if rows[0].sample.kept is not None else None
    # numpy: stacking one-element tensors row by row would take longer than a small model's forward.
    uniforms = torch.from_numpy(np.array([row.uniform for row in rows])).to(logits.device)
    return *draw(scores, uniforms), kept


def _kept_ids(scores: Float[Tensor, "B V"]) -> list[list[int] | None]:
    """Return the ids with a probability, per row; None where those are all."""
    left = (scores > -torch.inf).cpu().numpy()
    return [None if row.all() else row.nonzero()[0].tolist() for row in left]


def _check_finite(logprobs: list[float], rows: list[_Row]) -> None:
    bad = [row for row, logprob in zip(rows, logprobs, strict=True) if not math.isfinite(logprob)]
    if bad:
        raise not_finite(len(bad), len(rows), bad[0], len(bad[0].sample.tokens))
