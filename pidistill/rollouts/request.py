"""Check and do what all samplers have in common: settings, prompts, and what follows the end of a turn."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pidistill.errors import InputError, check_count, check_share
from pidistill.models.protocol import Decoder
from pidistill.rollouts.base import OnTurnEnd, Sample


@dataclass(frozen=True)
class Request:
    """Hold one call's settings, as in :meth:`pidistill.rollouts.base.Sampler.sample`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    max_new_tokens: int
    stop_ids: frozenset[int]
    pad_id: int
    on_turn_end: OnTurnEnd
    vocab_size: int
    max_turn_tokens: int | None = None


@runtime_checkable
class DecodingRow(Protocol):
    """Hold one completion that is being sampled."""

    index: int  # its number among all rows
    sample: Sample
    turn_start: int  # where the current turn begins in `sample.tokens`
    answer: Future | None  # what is awaited from `on_turn_end`; None while nothing is

    def append(self, ids: Sequence[int], *, sampled: bool, logprobs: Sequence[float]) -> None: ...


# ---------------------------------------------------------------------------------------------- turns


def end_turn(row: DecodingRow, request: Request) -> None:
    """Ask what follows the turn that just ended."""
    answer = request.on_turn_end(row.index, row.sample.tokens[row.turn_start :])
    if isinstance(answer, Future):
        row.answer = answer
    else:
        _follow(row, answer, request)


def collect_answers(rows: Sequence[DecodingRow], request: Request) -> None:
    """Take the answers that have come; wait for one only where every row waits."""
    waiting = [row for row in rows if row.answer is not None]
    if waiting and len(waiting) == len(rows):
        wait([row.answer for row in waiting], return_when=FIRST_COMPLETED)
    for row in waiting:
        if row.answer.done():
            answer, row.answer = row.answer, None
            _follow(row, answer.result(), request)


def _follow(row: DecodingRow, forced: Sequence[int] | None, request: Request) -> None:
    """End the row or force an observation; one that leaves no room for an answer is not begun."""
    if forced is None:
        row.sample.stop_reason = "done"
        return
    if len(row.sample.tokens) + len(forced) >= request.max_new_tokens:
        row.sample.stop_reason = "length"
        return
    _check_ids(f"the observation after a turn of row {row.index}", forced, request.vocab_size)
    row.append(list(forced), sampled=False, logprobs=[float("nan")] * len(forced))
    row.turn_start = len(row.sample.tokens)


# ---------------------------------------------------------------------------------------------- refusals


def check_settings(temperature: float, max_new_tokens: int) -> None:
    if not 0.0 <= temperature < float("inf"):
        raise InputError(f"sampler.temperature is {temperature}; give a number of at least 0 (0 is greedy)")
    check_count("sampler.max_new_tokens", max_new_tokens)


def check_truncation(top_p: float | None, **counts: int | None) -> None:
    """Refuse a wrong ``top_p``, and ``counts`` that are neither whole numbers of at least 1 nor null."""
    check_share("sampler.top_p", 1.0 if top_p is None else top_p, "give a probability, or null for all", "(0, 1]")
    for key, value in counts.items():
        check_count(f"sampler.{key}", value, null="no limit")


def check_request(
    model: Decoder, prompts: Sequence[Sequence[int]], group_size: int, seeds: Sequence[int], request: Request
) -> None:
    """Refuse one call's arguments; see :meth:`pidistill.rollouts.base.Sampler.sample`."""
    check_settings(request.temperature, request.max_new_tokens)
    _check_prompts(model, prompts, request)
    if group_size < 1 or len(seeds) != len(prompts) * group_size:
        raise InputError(f"{len(prompts)} prompts x group_size {group_size} need as many seeds, not {len(seeds)}")


def _check_prompts(model: Decoder, prompts: Sequence[Sequence[int]], request: Request) -> None:
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


def not_finite(rows: int, of: int, first: DecodingRow, tokens: int) -> InputError:
    """Return the error of a model without finite logits; ``first``'s completion token ``tokens`` is the first such one."""
    return InputError(
        f"the model's logits are not finite for {rows} of {of} rows (row {first.index}, completion token {tokens}); training "
        "has diverged or the checkpoint is broken: lower optimizer.lr, or check checkpointer"
    )
