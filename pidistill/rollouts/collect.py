"""Episodes: what a sampler writes goes to the environment, and what the environment answers goes back into the context."""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

from pidistill.distributed.tensor_parallel import follows, from_first, tensor_parallel_group
from pidistill.envs.base import Environment, EnvironmentCrash, EnvironmentOutputError, EnvironmentTimeout, check_step
from pidistill.errors import InputError
from pidistill.rewards.shaping import Shaping, add_shaping
from pidistill.rollouts.base import Sample, Sampler
from pidistill.rollouts.calls import DaemonThreads, abandoned_calls, ask
from pidistill.tokenizers.base import ChatTokenizer
from pidistill.types import Example, Message, PromptPair, Rollout, ViewName

_log = logging.getLogger(__name__)

DROP_REASONS = ("reward_error", "reward_not_finite", "environment_output", "environment_timeout", "environment_crash")
_REASONS = {
    EnvironmentOutputError: "environment_output",
    EnvironmentTimeout: "environment_timeout",
    EnvironmentCrash: "environment_crash",
}


@dataclass
class CollectResult:
    """Rollouts that have a reward, and how many have none, by reason; every reason is present, so that ranks can be summed.

    ``reward_error``: the environment (or its reward) raised. ``reward_not_finite``: it gave NaN or an infinity.
    ``environment_output``: it gave no EnvStep, or one with a reward that is no number or observations that are no messages.
    ``environment_timeout``: no answer within ``environment_timeout_s``. ``environment_crash``: the process that the
    environment ran in died (:class:`pidistill.envs.ProcessEnvironment`).
    """

    rollouts: list[Rollout]
    dropped: dict[str, int]


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
    shaping: Sequence[Shaping] = (),
) -> CollectResult:
    """Play ``group_size`` episodes of every example, the model seeing the prompt of ``view``.

    A rollout whose environment raised, hung, died or gave what is no answer is left out, counted and logged; its group is then
    smaller. The run goes on, and the other rollouts are what they would have been. With a sharded model every rank calls this,
    if need be with no examples.

    Args:
        seeds: one per rollout, group after group; see :func:`rollout_seed`.
        groups: the group number of each example's rollouts; by default its position.
        temperature, max_new_tokens: instead of the sampler's own.
        max_turns: assistant turns per episode; an episode that wants more stops with "max_turns". None is no limit.
        environment_threads: so many episodes talk to the environment at once, and the others go on sampling meanwhile; it
            and the tokenizer are then used from several threads. None asks the environment in the sampler's own thread. The
            rollouts are the same.
        environment_timeout_s: seconds that one `reset` or `step` may take; None is no limit. Waiting for a thread of
            ``environment_threads`` does not count. A call that is late costs its episode, and its thread is abandoned.
        shaping: parts added to the reward of every whole episode; see :mod:`pidistill.rewards.shaping`.

    Returns:
        rollouts in the order of ``seeds``.

    Raises:
        InputError: ``max_turns`` below 1, lists that do not match, or an environment that refuses an example on reset.
    """
    groups = range(len(examples)) if groups is None else groups
    if not len(examples) == len(prompts) == len(groups):
        raise InputError(f"{len(examples)} examples, {len(prompts)} prompts and {len(groups)} group numbers do not match")
    if max_turns is not None and max_turns < 1:
        raise InputError(f"max_turns is {max_turns}; give at least 1, or null for no limit")
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
    if follows(ranks):  # one of them talks to the environment, for all
        sample(on_turn_end=lambda row, ids: None)
        return from_first(ranks)
    parts = {"environment": environment, "tokenizer": tokenizer, "max_turns": max_turns, "timeout_s": environment_timeout_s}
    with DaemonThreads(environment_threads) if environment_threads else nullcontext() as threads:
        each = threads.map if threads else map
        begin = partial(_Episode, **parts)
        episodes = list(each(begin, [example for example in examples for _ in range(group_size)]))

        def answer(row: int, ids: list[int]) -> list[int] | None:
            return episodes[row].on_turn_end(ids)

        samples = sample(on_turn_end=partial(threads.submit, answer) if threads else answer)
        list(each(_Episode.finish, episodes, samples))
    rollouts = []
    for row, (episode, sample) in enumerate(zip(episodes, samples, strict=True)):
        if episode.failure is None:
            rollout = episode.rollout(sample, prompts[row // group_size], view, groups[row // group_size])
            episode.failure = _shape(rollout, shaping)
            if episode.failure is None:
                rollouts.append(rollout)
    _warn([episode for episode in episodes if episode.failure is not None])
    counts = Counter(episode.failure.reason for episode in episodes if episode.failure is not None)
    return from_first(ranks, CollectResult(rollouts, {reason: counts[reason] for reason in DROP_REASONS}))


def rollout_seed(seed: int, step: int, index: int, member: int) -> int:
    """Seed of one rollout's random stream: equal on every machine, rank and Python, different for any other four numbers.

    The first 63 bits of BLAKE2b of "seed,step,index,member". ``seed`` is the run's, ``step`` the round (or a negative number
    for a stream of its own, such as evaluation), ``index`` the example's, ``member`` the rollout's place in its group.
    torch's CPU generator uses the low 32 bits, all of them hashed: two rollouts of one group of 8 share a stream with
    probability 1e-8.
    """
    digest = hashlib.blake2b(f"{seed},{step},{index},{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class _Failure:
    reason: str
    detail: str
    error: BaseException | None = None

    @classmethod
    def of(cls, where: str, error: BaseException) -> "_Failure":
        reason = next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), None)
        if reason is None:
            return cls("reward_error", f"{where} raised {error!r}", error)
        return cls(reason, f"{where}: {error}")  # whose traceback would show our own code


@dataclass
class _Episode:
    """One rollout's conversation with the environment.

    Attributes:
        turns: assistant turns and those observations that are in the context.
        turn_rewards, turn_policy_tokens: one number per assistant turn.
        tokens: length of the context after the prompt: turns so far, and the observations that were handed to the sampler.
        failure: why the rollout has no reward; None while it has one.
    """

    example: Example
    environment: Environment
    tokenizer: ChatTokenizer
    max_turns: int | None
    timeout_s: float | None = None
    turns: list[Message] = field(default_factory=list)
    turn_rewards: list[float] = field(default_factory=list)
    turn_policy_tokens: list[int] = field(default_factory=list)
    tokens: int = 0
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    out_of_turns: bool = False
    failure: _Failure | None = None
    observations: list[Message] = field(default_factory=list)  # the last ones handed to the sampler

    def __post_init__(self) -> None:
        try:
            self.state = ask(partial(self.environment.reset, self.example), self.timeout_s)
        except InputError:  # environment and dataset do not fit: the user's to mend, and no row would fare better
            raise
        except (Exception, SystemExit) as error:
            self.failure = _Failure.of("reset", error)

    def on_turn_end(self, ids: list[int]) -> list[int] | None:
        """The ids of the environment's answer to a whole turn, generation prompt included; None ends the episode."""
        done = self._step(ids, truncated=False)
        if done:
            return None
        if len(self.turn_rewards) == self.max_turns:
            self.out_of_turns = True
            return None
        _say_what_is_rewritten(self.tokenizer)
        history = [*self.example.messages, *self.turns]
        observation_ids = self.tokenizer.encode_observations(history, self.observations, self.example.tools)
        self.turns += self.observations
        self.tokens += len(observation_ids)
        return observation_ids

    def finish(self, sample: Sample) -> None:
        """Settle what the token limit left: an observation that did not fit, or a turn cut short."""
        if self.failure is not None or sample.stop_reason not in ("length", "turn_length"):
            return
        if len(sample.tokens) < self.tokens:  # the observation was refused whole: it is not part of the completion
            del self.turns[len(self.turns) - len(self.observations) :]
        elif len(sample.tokens) > self.tokens:
            self._step(sample.tokens[self.tokens :], truncated=True)

    def rollout(self, sample: Sample, prompts: PromptPair, view: ViewName, group: int) -> Rollout:
        return Rollout(
            example=self.example,
            prompts=prompts,
            completion=sample.tokens,
            policy_mask=sample.policy_mask,
            sampled_logprobs=sample.logprobs,
            sampled_by=view,
            group=group,
            stop_reason="max_turns" if self.out_of_turns else sample.stop_reason,
            turns=self.turns,
            reward=self.reward,
            reward_parts=self.reward_parts,
            turn_rewards=self.turn_rewards,
            turn_policy_tokens=self.turn_policy_tokens,
        )

    def _step(self, ids: list[int], *, truncated: bool) -> bool:
        """Add one turn and the environment's verdict on it; True where the episode ends."""
        if self.failure is not None:
            return True
        turn = self.tokenizer.parse_turn(ids, self.example.tools)
        self.turns.append(turn)
        self.turn_policy_tokens.append(len(ids))
        self.tokens += len(ids)
        where = f"turn {len(self.turn_policy_tokens)}"
        try:  # only the environment's own work has a thread of its own: one that is late finds nothing here to change
            step = check_step(ask(partial(self.environment.step, self.state, turn, truncated=truncated), self.timeout_s))
        except (Exception, SystemExit) as error:  # whatever a user's code raises: a missing number must not end the run
            self.failure = _Failure.of(where, error)
            return True
        if not all(math.isfinite(value) for value in (step.reward, *step.reward_parts.values())):
            self.failure = _Failure("reward_not_finite", f"{where} gave {step.reward}, with parts {step.reward_parts}")
            return True
        self._add(step.reward, step.reward_parts)
        self.observations = step.observations
        return step.done

    def _add(self, reward: float, parts: dict[str, float]) -> None:
        self.reward += reward
        self.turn_rewards.append(reward)
        for name, value in parts.items():
            self.reward_parts[name] = self.reward_parts.get(name, 0.0) + value


def _shape(rollout: Rollout, parts: Sequence[Shaping]) -> _Failure | None:
    """Add the parts; what goes wrong costs the rollout, as an environment's reward would."""
    try:
        add_shaping(rollout, parts)
    except InputError:
        raise
    except Exception as error:
        return _Failure("reward_error", f"reward_shaping raised {error!r}", error)
    if not math.isfinite(rollout.reward):
        return _Failure("reward_not_finite", f"reward_shaping gave {rollout.reward}, with parts {rollout.reward_parts}")
    return None


_LOOKED_AT: WeakSet[ChatTokenizer] = WeakSet()


def _say_what_is_rewritten(tokenizer: ChatTokenizer) -> None:
    """Once per tokenizer, when the first episode goes on after a turn: serving then differs from training."""
    rewrites = getattr(tokenizer, "history_rewrites", None)
    if rewrites is None or tokenizer in _LOOKED_AT:
        return
    _LOOKED_AT.add(tokenizer)
    said = rewrites()
    if said is not None:
        _log.warning("%s", said)


def _warn(failed: list[_Episode]) -> None:
    """One warning per reason, with the first rollout's story: a broken reward fails on every row of every round."""
    for reason in DROP_REASONS:
        episodes = [episode for episode in failed if episode.failure.reason == reason]
        if episodes:
            first = episodes[0]
            _log.warning(
                "%d rollouts dropped (%s); the first one answers %s: %s",
                len(episodes),
                reason,
                first.example.id,
                first.failure.detail,
                exc_info=first.failure.error,
            )
    late = abandoned_calls()
    if late and any(episode.failure.reason == "environment_timeout" for episode in failed):
        _log.warning("%d calls of the environment still hang in abandoned threads", late)
