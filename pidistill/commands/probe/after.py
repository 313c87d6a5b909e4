"""Let the teacher go on from the words with which the student has begun its answer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pidistill.rollouts.base import Sample, Sampler
from pidistill.types import Rollout


class GoOn:
    """Sample one completion of every prompt, the first ids of which are given; turns after the first are free.

    Args:
        sampler: samples the rest.
        beginnings: the ids that the completion of each prompt begins with; all are of one length.
    """

    def __init__(self, sampler: Sampler, beginnings: Sequence[Sequence[int]]) -> None:
        self.sampler, self.beginnings = sampler, beginnings
        self.temperature, self.top_p, self.top_k = sampler.temperature, sampler.top_p, sampler.top_k
        self.max_new_tokens = sampler.max_new_tokens

    def sample(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        on_turn_end: Callable[[int, list[int]], Any],
        max_new_tokens: int | None = None,
        **settings: Any,
    ) -> list[Sample]:
        """Return whole completions; the log-probs of the given ids are NaN, since nobody sampled them here."""
        given = [list(ids) for ids in self.beginnings]
        waiting = dict(enumerate(given))

        def with_beginning(row: int, ids: list[int]) -> Any:
            return on_turn_end(row, waiting.pop(row, []) + ids)

        longest = max(map(len, given), default=0)  # all are as long, so that this is what each row has left
        limit = (self.max_new_tokens if max_new_tokens is None else max_new_tokens) - longest
        begun = [[*prompt, *ids] for prompt, ids in zip(prompts, given, strict=True)]
        samples = self.sampler.sample(model, begun, on_turn_end=with_beginning, max_new_tokens=limit, **settings)
        return [_whole(ids, sample) for ids, sample in zip(given, samples, strict=True)]


def _whole(ids: list[int], sample: Sample) -> Sample:
    return replace(
        sample,
        tokens=ids + sample.tokens,
        policy_mask=[True] * len(ids) + sample.policy_mask,
        logprobs=[math.nan] * len(ids) + sample.logprobs,
        kept=None,
    )


def beginning(rollout: Rollout, count: int) -> list[int] | None:
    """Return the first ``count`` ids of the rollout; None where its first turn is over by then."""
    return rollout.completion[:count] if rollout.turn_policy_tokens[0] > count else None
