"""Play episodes: what a sampler writes goes to the environment, and what the environment answers goes back into the context."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from pidistill.distributed.tensor_parallel import follows, from_first, tensor_parallel_group
from pidistill.envs.base import MAX_OBSERVATION_CHARS, Environment
from pidistill.errors import InputError, bounded_repr, check_count, escape_controls
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.rewards.shaping import Shaping
from pidistill.rollouts.base import OnTurnEnd, Sample, Sampler
from pidistill.rollouts.calls import DaemonThreads, abandoned_calls, marked_interrupts
from pidistill.rollouts.episode import DROP_REASONS, Episode, EpisodeRules
from pidistill.rollouts.progress import sampling_progress
from pidistill.tokenizers.base import ChatTokenizer
from pidistill.types import Example, PromptPair, Rollout, ViewName

_log = logging.getLogger(__name__)


@dataclass
class CollectResult:
    """Hold the rollouts that were played to their end, and how many failed and have no reward, by reason.

    ``dropped`` has every reason of :data:`DROP_REASONS`, so that the counts of several ranks can be summed.
    """

    rollouts: list[Rollout]
    dropped: dict[str, int]
    sampled_tokens: int  # policy tokens, those of failed rollouts too


def collect_rollouts(
    model: Any,
    sampler: Sampler,
    tokenizer: ChatTokenizer,
    environment: Environment,
    examples: Sequence[Example],
    prompts: Sequence[PromptPair],
    *,
    view: ViewName,
    group_size: int,
    seeds: Sequence[int],
    groups: Sequence[int] | None = None,
    temperature: float | None = None,
    max_turns: int | None = None,
    max_new_tokens: int | None = None,
    environment_threads: int | None = None,
    environment_timeout_s: float | None = None,
    max_observation_chars: int = MAX_OBSERVATION_CHARS,
    shaping: Sequence[Shaping] = (),
    privileged: PrivilegedPrompt | None = None,
    max_seq_len: int | None = None,
    rewarded: bool = True,
) -> CollectResult:
    """Play ``group_size`` episodes of every example; the model sees the prompt of ``view``.

    A rollout whose environment raised, hung, died or returned what is no answer is left out, counted and logged; its group is
    then smaller. The run continues, and the other rollouts do not change. With a sharded model every rank calls
    this function, also a rank that has no examples.

    Args:
        seeds: one per rollout, group after group; see :func:`rollout_seed`.
        groups: the group number of each example's rollouts; by default its position.
        temperature, max_new_tokens: replace the sampler's own settings.
        max_turns: assistant turns per episode; an episode that wants more stops with "max_turns". None is no limit.
        environment_threads: this many episodes talk to the environment at once, and the others continue to sample. The
            environment and the tokenizer are then used from several threads. None asks the environment in the sampler's own
            thread. The rollouts are the same.
        environment_timeout_s: seconds that one `reset` or `step` may take; None is no limit. Waiting for a thread of
            ``environment_threads`` does not count. A call that is late costs its episode, and its thread is abandoned.
        max_observation_chars: characters of the environment's answer to one turn; a longer answer costs its episode.
        shaping: parts added to the reward of every whole episode; see :mod:`pidistill.rewards.shaping`.
        privileged: how the teacher's view shows what an answer brings as ``EnvStep.privileged``; None keeps it from both views.
        max_seq_len: tokens that this view may have; None takes the tokenizer's limit.
        rewarded: an answer without a reward costs its episode; False where the environment is meant to give none.

    Returns:
        rollouts in the order of ``seeds``.
    """
    groups = range(len(examples)) if groups is None else groups
    _check_arguments(len(examples), len(prompts), len(groups), max_turns)
    sample = partial(
        sampler.sample,
        model,
        [pair.of(view) for pair in prompts],
        group_size=group_size,
        seeds=seeds,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )
    ranks = tensor_parallel_group(model)
    if follows(ranks):  # one rank talks to the environment, for all of them
        sample(on_turn_end=lambda row, ids: None)
        return from_first(ranks)
    limits = (max_turns, environment_timeout_s, max_observation_chars)
    most = tokenizer.max_seq_len if max_seq_len is None else max_seq_len
    rules = EpisodeRules(environment, tokenizer, *limits, tuple(shaping), view, privileged, most, rewarded)
    title = f"sampling, {view} view{', greedy' if temperature == 0 else ''}"
    with marked_interrupts(), sampling_progress(len(seeds), title):
        rows = [row for row in range(len(prompts)) for _ in range(group_size)]
        starts = [(examples[row], prompts[row].of(view)) for row in rows]
        episodes, samples = _play(rules, sample, starts, environment_threads)
        rollouts = [
            episode.rollout(sample, prompts[row], view, groups[row])
            for episode, sample, row in zip(episodes, samples, rows, strict=True)
        ]
    _warn([episode for episode in episodes if episode.failure is not None])
    counts = Counter(episode.failure.reason for episode in episodes if episode.failure is not None)
    kept = [rollout for rollout in rollouts if rollout is not None]
    tokens = sum(sum(sample.policy_mask) for sample in samples)
    return from_first(ranks, CollectResult(kept, {reason: counts[reason] for reason in DROP_REASONS}, tokens))


def _check_arguments(examples: int, prompts: int, groups: int, max_turns: int | None) -> None:
    if not examples == prompts == groups:
        raise InputError(f"{examples} examples, {prompts} prompts and {groups} group numbers do not match")
    check_count("max_turns", max_turns, null="no limit")


def _play(
    rules: EpisodeRules,
    sample: Callable[..., list[Sample]],
    starts: Sequence[tuple[Example, Sequence[int]]],
    environment_threads: int | None,
) -> tuple[list[Episode], list[Sample]]:
    """Return one episode and one sample for each of the examples with their prompts, all of them ended."""
    with DaemonThreads(environment_threads) if environment_threads else nullcontext() as threads:
        each = threads.map if threads else map
        episodes = list(each(lambda start: Episode(rules, *start), starts))

        def answer(row: int, ids: list[int]) -> list[int] | None:
            return episodes[row].on_turn_end(ids)

        on_turn_end: OnTurnEnd = partial(threads.submit, answer) if threads else answer
        samples = sample(on_turn_end=on_turn_end)
        list(each(Episode.finish, episodes, samples))
    return episodes, samples


def rollout_seed(seed: int, step: int, index: int, member: int) -> int:
    """Return the seed of a rollout's random stream: the same on every machine, rank and Python, another for other numbers.

    The first 63 bits of BLAKE2b of "seed,step,index,member". ``seed`` is the run's, ``step`` the round (or a negative number
    for a stream of its own, such as evaluation), ``index`` the example's, ``member`` the rollout's place in its group.
    torch's CPU generator uses the low 32 bits, all of them hashed: two rollouts of one group of 8 share a stream with
    probability 1e-8.
    """
    digest = hashlib.blake2b(f"{seed},{step},{index},{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _warn(failed: Sequence[Episode]) -> None:
    """Log one warning per reason, with the first episode's story: a broken reward fails on every row of every round."""
    for reason in DROP_REASONS:
        episodes = [episode for episode in failed if episode.failure.reason == reason]
        if episodes:
            first = episodes[0]
            _log.warning(
                "%d rollouts dropped (%s); the first one is of %s: %s",
                len(episodes),
                reason,
                bounded_repr(first.example.id, 200),
                escape_controls(first.failure.detail),
            )
    late = abandoned_calls()
    if late and any(episode.failure.reason == "environment_timeout" for episode in failed):
        _log.warning("%d calls of the environment still hang in abandoned threads", late)
