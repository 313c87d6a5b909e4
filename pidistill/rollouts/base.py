"""Say what a sampler is: prompts in, sampled ids with their log-probs out. Samplers know nothing of environments."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

OnTurnEnd = Callable[[int, list[int]], list[int] | Future[list[int] | None] | None]


@dataclass
class Sample:
    """Hold what a sampler returns for one row."""

    tokens: list[int]  # [T] sampled ids and forced observation ids, in order
    policy_mask: list[bool]  # [T] True where the token was sampled
    logprobs: list[float]  # [T] fp32 nats of each sampled token under the distribution it was drawn from; NaN where forced
    # "done" (`on_turn_end` returned None), "length" (token limit reached first) or, from samplers that limit single turns,
    # "turn_length" (the last turn reached that limit; the row ends with it).
    stop_reason: str
    # One set of ids per sampled token: what top-k and top-p left, None for the whole vocabulary; None where nobody records it.
    kept: list[Sequence[int] | None] | None = None


@runtime_checkable
class Sampler(Protocol):
    """Sample completions. The attributes are the settings; the scorer reads ``temperature``, so both use one distribution.

    A sampler that takes shorter rows than the model may have a static method ``find_length_limit(settings, model)``, which
    returns (tokens, what sets them) or None: longer rows are then found when the data are loaded.
    """

    temperature: float
    top_p: float | None
    top_k: int | None
    max_new_tokens: int

    def sample(
        self,
        model: Any,
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
        """Sample ``group_size`` completions of every prompt.

        Row ``p * group_size + g`` is completion g of prompt p and draws from its own stream, seeded with ``seeds[row]``: what
        it samples does not depend on which rows share its batch. When a row samples a stop id, ``on_turn_end(row, ids of the
        turn including the stop id)`` returns the ids to force next (an observation), or None to end the row; or a Future of
        either, and the other rows continue until it is there.
        ``max_new_tokens`` counts sampled and forced tokens of a row together. ``temperature`` 0 is greedy.
        """
