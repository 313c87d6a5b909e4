"""Sampling from any torchtune decoder, sharded or not, without changing it.

`torchtune.generation.generate` keeps every logit of every step, runs until the last row stops and gives no log-probs. This
loop keeps one step's logits at a time, lets finished rows leave the batch, records the log-prob of each token under the
distribution it was drawn from, and forces the observations of multi-turn episodes between the sampled turns.

A batch is a rectangle: prompts are padded on the left, and every row advances by the same number of columns in each forward.
A row that waits for the end of a forced observation reads it while the other rows sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchtune.modules import TransformerDecoder

from pidistill.errors import InputError
from pidistill.rollouts.base import OnTurnEnd, Sample
from pidistill.rollouts.decoding import Context, decoding, evaluating, gathered_parameters
from pidistill.rollouts.distribution import inverse_cdf, sampling_logprobs

# Copying the caches of the rows that go on costs about one step of attention; the finished rows cost that in every step.
_COMPACT_AT_FRAC = 0.25


@dataclass(kw_only=True)
class TorchtuneSampler:
    """The default sampler; see :class:`pidistill.rollouts.base.Sampler` for what `sample` promises.

    Attributes:
        max_new_tokens: sampled and forced tokens of one completion, together.
        temperature: divides the logits; 0 is greedy, whose log-probs are 0.0 (a point mass): for evaluation only.
        top_k: keep the k most probable tokens, and those tied with the last of them; null keeps all.
        top_p: keep the fewest most probable tokens that together reach this probability, after temperature and top_k; null
            keeps all. Either one makes the sampling distribution differ from the one that is trained.
        max_batch_size: rows in one batch; null is all of them. Less needs less memory for keys and values.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        _check_settings(self.temperature, self.max_new_tokens)
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"sampler.top_p is {self.top_p}; give a probability above 0 and at most 1, or null for all")
        for key, value in (("top_k", self.top_k), ("max_batch_size", self.max_batch_size)):
            if value is not None and value < 1:
                raise InputError(f"sampler.{key} is {value}; give at least 1, or null for no limit")

    def sample(
        self,
        model: TransformerDecoder,
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
        once at the start, after which each rank samples as long as it needs.

        A row's tokens depend on its prompt and seed, not on its batch; only where a draw falls within rounding error of
        the border between two tokens can another batch decide otherwise (about 1e-7 per token in fp32, more in bf16).

        Raises:
            InputError: a prompt is empty, too long for the model or holds an id that the model lacks; a setting is out of
                range; or the model gives logits that are not finite.
        """
        request = _Request(
            temperature=self.temperature if temperature is None else temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            stop_ids=stop_ids,
            pad_id=pad_id,
            on_turn_end=on_turn_end,
            vocab_size=model.tok_embeddings.num_embeddings,
        )
        _check_settings(request.temperature, request.max_new_tokens)
        _check_prompts(model, prompts, request)
        if group_size < 1 or len(seeds) != len(prompts) * group_size:
            raise InputError(f"{len(prompts)} prompts x group_size {group_size} need as many seeds, not {len(seeds)}")
        rows = [_Row(r, r // group_size, seed) for r, seed in enumerate(seeds)]
        size = self.max_batch_size or max(len(rows), 1)
        # Not inference_mode: parameters gathered in it could not be trained afterwards.
        with torch.no_grad(), gathered_parameters(model), evaluating(model):
            for start in range(0, len(rows), size):
                _sample_rows(model, prompts, rows[start : start + size], request)
        return [row.sample for row in rows]


# ---------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Request:
    """One call's settings, as in :meth:`TorchtuneSampler.sample`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    max_new_tokens: int
    stop_ids: frozenset[int]
    pad_id: int
    on_turn_end: OnTurnEnd
    vocab_size: int


@dataclass
class _Row:
    """One completion on its way.

    Attributes:
        index, prompt: its number among all rows, and which prompt it answers.
        unread: ids of ``sample.tokens`` that the model has not read yet; never empty between steps unless finished.
        turn_start: where the current turn begins in ``sample.tokens``.
    """

    index: int
    prompt: int
    seed: int
    sample: Sample = field(default_factory=lambda: Sample([], [], [], ""))
    unread: list[int] = field(default_factory=list)
    turn_start: int = 0

    @property
    def finished(self) -> bool:
        return self.sample.stop_reason != ""

    def draw_uniforms(self, n: int) -> None:
        """The row's own stream: token t of the completion, if sampled, is decided by number t of it."""
        self._uniforms = torch.rand(n, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64).numpy()

    @property
    def uniform(self) -> float:
        return self._uniforms[len(self.sample.tokens)]

    def append(self, ids: Sequence[int], *, sampled: bool, logprob: float) -> None:
        self.sample.tokens += ids
        self.sample.policy_mask += [sampled] * len(ids)
        self.sample.logprobs += [logprob] * len(ids)
        self.unread += ids

    def read(self, n: int) -> list[int]:
        """The next n ids for the model."""
        ids, self.unread = self.unread[:n], self.unread[n:]
        return ids


def _sample_rows(model: TransformerDecoder, prompts: Sequence[Sequence[int]], rows: list[_Row], request: _Request) -> None:
    """Sample the rows of one batch to their ends."""
    used = sorted({row.prompt for row in rows})
    slot_of = {prompt: slot for slot, prompt in enumerate(used)}
    for row in rows:
        row.draw_uniforms(request.max_new_tokens)
    longest = max(len(prompts[p]) for p in used)
    with decoding(model, longest + request.max_new_tokens) as context:
        # Each prompt is read once, whatever the size of its group.
        logits = context.read_prompts([prompts[p] for p in used], request.pad_id)
        slots = context.tensor([slot_of[row.prompt] for row in rows])
        context.select(slots)
        _draw(logits[slots], rows, request)
        while not all(row.finished for row in rows):
            rows = _without_finished(rows, context)
            n = min(len(row.unread) for row in rows if not row.finished)
            tokens = [[request.pad_id] * n if row.finished else row.read(n) for row in rows]
            due = [b for b, row in enumerate(rows) if not row.finished and not row.unread]
            _draw(context.read(tokens, due), [rows[b] for b in due], request)


def _without_finished(rows: list[_Row], context: Context) -> list[_Row]:
    """The rows that go on, once enough have finished to be worth the copy; until then the finished ones read padding."""
    going_on = [b for b, row in enumerate(rows) if not row.finished]
    if len(rows) - len(going_on) < max(1, _COMPACT_AT_FRAC * len(rows)):
        return rows
    context.select(context.tensor(going_on))
    return [rows[b] for b in going_on]


def _draw(logits: Float[Tensor, "B V"], rows: list[_Row], request: _Request) -> None:
    """Give each row its next token, and what follows from it."""
    ids, logprobs = _choose(logits, rows, request)
    for row, token, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
        row.append([token], sampled=True, logprob=logprob)
        if token in request.stop_ids:
            _end_turn(row, request)
        elif len(row.sample.tokens) == request.max_new_tokens:
            row.sample.stop_reason = "length"


def _choose(logits: Float[Tensor, "B V"], rows: list[_Row], request: _Request) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """One token per row, and its log-prob under the distribution it was drawn from."""
    if request.temperature == 0:
        best, ids = logits.max(dim=-1)
        _check_finite(best, rows)
        return ids, torch.zeros_like(best)
    logprobs = sampling_logprobs(logits, request.temperature, request.top_k, request.top_p)
    # numpy: stacking one-element tensors row by row would take longer than a small model's forward.
    uniforms = torch.from_numpy(np.array([row.uniform for row in rows])).to(logits.device)
    ids = inverse_cdf(logprobs, uniforms)
    chosen = logprobs.gather(1, ids[:, None])[:, 0]
    _check_finite(chosen, rows)
    return ids, chosen


def _end_turn(row: _Row, request: _Request) -> None:
    """Ask what follows the turn that just ended; an observation that leaves no room for an answer is not begun."""
    turn = row.sample.tokens[row.turn_start :]
    forced = request.on_turn_end(row.index, list(turn))
    if forced is None:
        row.sample.stop_reason = "done"
        return
    if len(row.sample.tokens) + len(forced) >= request.max_new_tokens:
        row.sample.stop_reason = "length"
        return
    _check_ids(f"the observation after a turn of row {row.index}", forced, request.vocab_size)
    row.append(list(forced), sampled=False, logprob=float("nan"))
    row.turn_start = len(row.sample.tokens)


# ---------------------------------------------------------------------------------------------- refusals


def _check_settings(temperature: float, max_new_tokens: int) -> None:
    if not 0.0 <= temperature < float("inf"):
        raise InputError(f"sampler.temperature is {temperature}; give a number of at least 0 (0 is greedy)")
    if max_new_tokens < 1:
        raise InputError(f"sampler.max_new_tokens is {max_new_tokens}; give at least 1")


def _check_prompts(model: TransformerDecoder, prompts: Sequence[Sequence[int]], request: _Request) -> None:
    _check_ids("padding", [request.pad_id], request.vocab_size)
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {number} has no tokens; a tokenizer with a bos id or a chat template would give it some")
        over = len(prompt) + request.max_new_tokens - model.max_seq_len
        if over > 0:
            raise InputError(
                f"prompt {number} ({len(prompt)} tokens) plus sampler.max_new_tokens {request.max_new_tokens} exceeds the "
                f"model's max_seq_len {model.max_seq_len} by {over}; raise model.max_seq_len, lower sampler.max_new_tokens, "
                "or drop long prompts from the dataset"
            )
        _check_ids(f"prompt {number}", prompt, request.vocab_size)


def _check_ids(what: str, ids: Sequence[int], vocab_size: int) -> None:
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise InputError(
            f"{what} holds id {wrong}, but the model's vocabulary has {vocab_size} ids (0 to {vocab_size - 1}); "
            "tokenizer and model are of different families: check tokenizer.path and the model's vocab_size"
        )


def _check_finite(values: Float[Tensor, " B"], rows: list[_Row]) -> None:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        row = rows[bad[0]]
        raise InputError(
            f"the model's logits are not finite for {len(bad)} of {len(rows)} rows (row {row.index}, completion token "
            f"{len(row.sample.tokens)}); training has diverged or the checkpoint is broken: lower optimizer.lr, or check "
            "checkpointer"
        )
