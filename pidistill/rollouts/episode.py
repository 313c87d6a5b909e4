"""Play one episode: the conversation of one rollout with the environment, and what goes wrong in it.

Whatever the code of a user raises or returns (an environment, a reward, a part of `reward_shaping`) costs its own episode and
no other; :meth:`Episode._ask` is the one place where it is caught.
"""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

from pidistill.chat.messages import with_text
from pidistill.envs.base import (
    LARGEST_REWARD,
    Environment,
    EnvironmentCrash,
    EnvironmentOutputError,
    EnvironmentTimeout,
    EnvStep,
    check_step,
    is_usable,
    judge_unfinished,
)
from pidistill.errors import InputError, attempt, bounded_repr, bounded_traceback
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.privileged.turn_templates import find_turn_difference
from pidistill.rewards.shaping import Shaping, add_shaping
from pidistill.rollouts.base import Sample
from pidistill.rollouts.calls import ask
from pidistill.tokenizers.base import ChatTokenizer
from pidistill.types import Example, Message, PromptPair, Rollout, ViewName

_log = logging.getLogger(__name__)
T = TypeVar("T")

DROP_REASONS = ("reward_error", "reward_not_finite", "environment_output", "environment_timeout", "environment_crash")
"""Why a rollout has no reward.

``reward_error``: the environment, its reward or a part of `reward_shaping` raised. ``reward_not_finite``: it gave NaN, an
infinity or a number beyond :data:`~pidistill.envs.base.LARGEST_REWARD`. ``environment_output``: it returned no EnvStep, one
with a reward that is no number, observations that are no messages, too long, or refused by the tokenizer (alone or with the
text for the teacher), or a state that cannot be kept. ``environment_timeout``: no answer came within the time limit.
``environment_crash``: the process that the environment ran in died (:class:`pidistill.envs.ProcessEnvironment`).
"""
_OWN_REASONS = {
    EnvironmentOutputError: "environment_output",
    EnvironmentTimeout: "environment_timeout",
    EnvironmentCrash: "environment_crash",
}


@dataclass(frozen=True)
class Failure:
    """Say why an episode has no reward: one of :data:`DROP_REASONS`, and a text for the log."""

    reason: str
    detail: str


@dataclass(frozen=True)
class EpisodeRules:
    """Hold what all episodes of a call share; see :func:`pidistill.rollouts.collect.collect_rollouts`."""

    environment: Environment
    tokenizer: ChatTokenizer
    max_turns: int | None
    timeout_s: float | None
    max_observation_chars: int
    shaping: tuple[Shaping, ...]
    view: ViewName = "student"  # the one that samples
    privileged: PrivilegedPrompt | None = None  # how the teacher is shown what comes with an answer; None: it is not
    max_seq_len: int | None = None  # tokens that the teacher's view of a whole rollout may have
    rewarded: bool = True  # False: the environment may leave an episode without a reward


@dataclass
class Episode:
    """Hold one rollout's conversation with the environment; ``turn_`` lists have one number per assistant turn."""

    rules: EpisodeRules
    example: Example
    before: Sequence[int] = ()  # ids right before the next turn: the prompt, then the last observation
    turns: list[Message] = field(default_factory=list)  # assistant turns and those observations that are in the context
    turn_rewards: list[float] = field(default_factory=list)
    turn_policy_tokens: list[int] = field(default_factory=list)
    tokens: int = 0  # of the context after the prompt: turns so far, and observations that were handed to the sampler
    reward: float | None = 0.0  # None once a step gave none
    reward_parts: dict[str, float] = field(default_factory=dict)
    out_of_turns: bool = False
    failure: Failure | None = None  # why the rollout has no reward; None while it has one
    observations: list[Message] = field(default_factory=list)  # the last ones that were handed to the sampler
    # Per observation that came with privileged information: where it begins in the context, its ids, and those of the teacher.
    shown: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    privileged: str | None = None  # what came with the last answer
    state: Any = None

    def __post_init__(self) -> None:
        reset = partial(self.rules.environment.reset, self.example)
        # An InputError here says that environment and dataset do not fit, which every row would show: the user must mend it.
        self.state = self._ask("reset", partial(ask, reset, self.rules.timeout_s), passes=InputError)

    def on_turn_end(self, ids: list[int]) -> list[int] | None:
        """Return the ids of the environment's answer to a whole turn, generation prompt included; None ends the episode."""
        if self._step(ids, truncated=False):
            return None
        if len(self.turn_policy_tokens) == self.rules.max_turns:
            self.out_of_turns = True
            self._judge_unfinished()
            return None
        tokenizer, history = self.rules.tokenizer, [*self.example.messages, *self.turns]
        _warn_of_rewritten_turns(tokenizer)
        encode = partial(tokenizer.encode_observations, history, self.observations, self.example.tools)
        where = f"the tokenizer, with the observation after turn {len(self.turn_policy_tokens)}"
        observation_ids = self._ask(where, encode, reason="environment_output")
        if observation_ids is None or not self._check_templates(history):
            return None
        self.turns += self.observations
        forced = self._show_teacher(history, observation_ids) if self.privileged else observation_ids
        self.tokens += 0 if forced is None else len(forced)
        self.before = forced or ()
        return forced

    def _check_templates(self, history: list[Message]) -> bool:
        """Refuse a teacher's chat template that writes the observations in another way; False where it takes none of them."""
        if self.rules.privileged is None:
            return True
        arguments = (self.rules.privileged, self.rules.tokenizer, self.example, history, self.observations)
        where = f"the teacher's tokenizer, with the observation after turn {len(self.turn_policy_tokens)}"
        error = self._ask(where, partial(find_turn_difference, *arguments), reason="environment_output")
        if error is not None:  # every answer would show it: the user must mend it
            raise error
        return self.failure is None

    def _show_teacher(self, history: list[Message], own: list[int]) -> list[int] | None:
        """Note what the teacher reads in the place of an observation's ids; return what the view that samples reads."""
        if self.rules.privileged is None:
            return own
        *others, last = self.observations or [{"role": "user", "content": ""}]

        def encode(text: str) -> list[int]:
            return self.rules.tokenizer.encode_observations(history, [*others, with_text(last, text)], self.example.tools)

        row = replace(self.example, privileged=self.privileged)
        self.rules.privileged.check_turns(row.id)  # the config's fault; what is wrong with one text costs its own episode
        ask_prompt = partial(self.rules.privileged.show_at_turn, row, encode)
        where = f"the privileged information after turn {len(self.turn_policy_tokens)}"
        shown = self._ask(where, ask_prompt, reason="environment_output")
        if self.failure is not None:
            return None
        if shown is not None:
            self.shown.append((self.tokens, own, shown))
        return own if shown is None or self.rules.view == "student" else shown

    def finish(self, sample: Sample) -> None:
        """Settle what the token limit left: an observation that did not fit, or a turn that was cut short."""
        if self.failure is not None or sample.stop_reason not in ("length", "turn_length"):
            return
        if len(sample.tokens) < self.tokens:  # the observation was refused whole: it is not part of the completion
            del self.turns[len(self.turns) - len(self.observations) :]
            self.shown = [entry for entry in self.shown if entry[0] < len(sample.tokens)]
            self._judge_unfinished()
        elif len(sample.tokens) > self.tokens:
            self._step(sample.tokens[self.tokens :], truncated=True)

    def rollout(self, sample: Sample, prompts: PromptPair, view: ViewName, group: int) -> Rollout | None:
        """Return the rollout with its shaped reward; None, with ``failure`` set, where it has no reward."""
        if self.failure is not None:
            return None
        (tokens, mask, logprobs), reads = self._as_student_reads(sample)
        rollout = Rollout(
            example=self.example,
            prompts=prompts,
            completion=tokens,
            policy_mask=mask,
            sampled_logprobs=logprobs,
            teacher_reads=reads,
            kept=sample.kept,
            sampled_by=view,
            group=group,
            stop_reason="max_turns" if self.out_of_turns else sample.stop_reason,
            turns=self.turns,
            reward=self.reward,
            reward_parts=self.reward_parts,
            turn_rewards=self.turn_rewards,
            turn_policy_tokens=self.turn_policy_tokens,
        )
        leave_out_what_is_too_long(rollout, self.rules.max_seq_len)
        self._ask("reward_shaping", partial(add_shaping, rollout, self.rules.shaping))
        self._check_numbers("the whole episode", rollout.reward, rollout.reward_parts)
        return None if self.failure is not None else rollout

    def _as_student_reads(self, sample: Sample) -> tuple[list[list], list[tuple[int, int, list[int]]]]:
        """Return ids, policy mask and log-probs with the student's observations, and what the teacher reads in their place."""
        columns = [sample.tokens, sample.policy_mask, sample.logprobs]
        if self.rules.view == "student" or not self.shown:
            return columns, [(first, first + len(own), shown) for first, own, shown in self.shown]
        made, reads, done = [[], [], []], [], 0
        for first, own, shown in self.shown:
            for column, values, observed in zip(made, columns, (own, [False] * len(own), [math.nan] * len(own)), strict=True):
                column += [*values[done:first], *observed]
            reads.append((len(made[0]) - len(own), len(made[0]), shown))
            done = first + len(shown)
        return [column + list(values[done:]) for column, values in zip(made, columns, strict=True)], reads

    def _step(self, ids: list[int], *, truncated: bool) -> bool:
        """Add one turn and the environment's verdict on it; return True where the episode ends."""
        if self.failure is not None:
            return True
        where = f"turn {len(self.turn_policy_tokens) + 1}"
        read = partial(self.rules.tokenizer.parse_turn, ids, self.example.tools)
        if hasattr(self.rules.tokenizer, "parse_turn_after"):
            read = partial(self.rules.tokenizer.parse_turn_after, self.before, ids, self.example.tools)
        turn = self._ask(f"reading {where}", read)
        if turn is None:
            return True
        self.turns.append(turn)
        self.turn_policy_tokens.append(len(ids))
        self.tokens += len(ids)
        step = self._ask(where, partial(self._environment_step, turn, truncated))
        if step is None or not self._check_numbers(where, step.reward, step.reward_parts):
            return True
        self._add(step.reward, step.reward_parts)
        self.observations, self.privileged = step.observations, step.privileged
        return step.done

    def _environment_step(self, turn: Message, truncated: bool) -> EnvStep:
        # Only the environment's own work has a thread of its own, and it gets a copy of the turn: a call that is late finds
        # nothing here to change.
        call = partial(self.rules.environment.step, self.state, copy.deepcopy(turn), truncated=truncated)
        answer, most = ask(call, self.rules.timeout_s), self.rules.max_observation_chars
        return check_step(answer, most, rewarded=self.rules.rewarded)

    def _judge_unfinished(self) -> None:
        """Add the environment's verdict on an episode that a limit ended after a whole turn; it counts to that turn."""
        call = partial(judge_unfinished, self.rules.environment, self.state)
        where = "the unfinished episode"
        step = self._ask(where, lambda: check_step(ask(call, self.rules.timeout_s), rewarded=self.rules.rewarded))
        if step is None or not self._check_numbers(where, step.reward, step.reward_parts):
            return
        before = self.turn_rewards[:-1], self.turn_rewards[-1:]
        self._add(step.reward, step.reward_parts)
        if self.turn_rewards:
            self.turn_rewards = [*before[0], before[1][0] + step.reward]

    def _ask(
        self, where: str, call: Callable[[], T], reason: str = "reward_error", passes: type[BaseException] | tuple = ()
    ) -> T | None:
        """Return the answer of a call, or None with ``failure`` set where it raises anything other than ``passes``."""
        answer, error = attempt(call)
        if isinstance(error, passes):
            raise error
        if error is not None:
            self.failure = _failure(where, error, reason)
        return answer

    def _check_numbers(self, where: str, reward: float | None, parts: dict[str, float]) -> bool:
        """Return whether reward and parts can be computed with; if not, the episode has failed."""
        if self.failure is None and not all(map(is_usable, (reward or 0.0, *parts.values()))):
            told = f"{where} gave {reward}, with parts {bounded_repr(parts)}; a reward is at most {LARGEST_REWARD:g}"
            self.failure = Failure("reward_not_finite", told)
        return self.failure is None

    def _add(self, reward: float | None, parts: dict[str, float]) -> None:
        self.reward = None if reward is None or self.reward is None else self.reward + reward
        self.turn_rewards = [] if self.reward is None else [*self.turn_rewards, reward]
        for name, value in parts.items():
            self.reward_parts[name] = self.reward_parts.get(name, 0.0) + value


def leave_out_what_is_too_long(rollout: Rollout, max_seq_len: int | None) -> None:
    """Take the last of the privileged texts out of the teacher's view, one by one, until it fits; count them."""
    if rollout.sampled_by == "teacher" or max_seq_len is None:
        return  # the sampler has kept to its limits
    while rollout.teacher_reads and len(rollout.sequence("teacher")[0]) > max_seq_len:
        rollout.teacher_reads.pop()
        rollout.teacher_reads_left_out += 1


def _failure(where: str, error: BaseException, reason: str) -> Failure:
    """Return what a call's exception costs, in bounded texts."""
    own = next((own for kind, own in _OWN_REASONS.items() if isinstance(error, kind)), None)
    if own is not None:  # our own exception: its traceback would show our own code
        text, failed = attempt(lambda: str(error))
        return Failure(own, f"{where}: {bounded_repr(error, 500) if failed else text[:500]}")
    return Failure(reason, f"{where} raised {bounded_repr(error, 500)}\n{bounded_traceback(error)}")


_LOOKED_AT: WeakSet[ChatTokenizer] = WeakSet()


def _warn_of_rewritten_turns(tokenizer: ChatTokenizer) -> None:
    """Say once per tokenizer, when the first episode goes on after a turn, where serving differs from training."""
    rewrites = getattr(tokenizer, "history_rewrites", None)
    if rewrites is None or tokenizer in _LOOKED_AT:
        return
    _LOOKED_AT.add(tokenizer)
    said = rewrites()
    if said is not None:
        _log.warning("%s", said)
