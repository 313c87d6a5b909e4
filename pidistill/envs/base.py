"""Say what an environment is, and check what one answers. One stateless object serves many episodes, each with its state."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from pidistill.chat.messages import check_messages, message_text
from pidistill.errors import InputError, bounded_repr
from pidistill.types import Example, Message


@dataclass
class EnvStep:
    """Hold what an environment answers to one assistant turn."""

    observations: list[Message]  # messages forced into the context before the next turn; empty when `done`
    reward: float | None  # added to the episode's reward; None in every step of an environment that gives none
    done: bool  # the episode ends here
    reward_parts: dict[str, float] = field(default_factory=dict)  # named parts of `reward`, for the log
    # What only the teacher's view sees, from the next turn on: it stands at the end of the last observation there.
    privileged: str | None = None


@runtime_checkable
class Environment(Protocol):
    """Answer the turns of episodes; see docs/environments.md."""

    def reset(self, example: Example) -> Any:
        """Start an episode on ``example`` and return its state."""

    def step(self, state: Any, turn: Message, *, truncated: bool) -> EnvStep:
        """Answer one assistant turn, changing ``state`` in place.

        ``truncated``: the turn hit the token limit before its end-of-turn token; the episode ends with any answer.
        With ``environment_threads`` or ``environment_timeout_s`` this is called from several threads, each episode from one
        at a time.
        """


def judge_unfinished(environment: Any, state: Any) -> EnvStep:
    """Return the environment's verdict on an episode that `max_turns` or the token limit ended after a whole turn.

    An environment may have the method ``unfinished(state) -> EnvStep``, of which reward and parts are read. Without one such an
    episode keeps the rewards of its turns: 0 where the answer alone is judged.
    """
    has_verdict = callable(getattr(type(environment), "unfinished", None))  # a proxy may have an attribute of every name
    return environment.unfinished(state) if has_verdict else EnvStep([], 0.0, done=True)


class EnvironmentTimeout(Exception):
    """Say that no answer came in time (`environment_timeout`); an environment with limits of its own may raise it."""


class EnvironmentCrash(Exception):
    """Say that what the environment ran in has died (`environment_crash`); one that talks to a sandbox may raise it."""


class EnvironmentOutputError(Exception):
    """Say that what an environment returned is no answer (`environment_output`)."""


MAX_OBSERVATION_CHARS = 200_000  # the default of the key `max_observation_chars`
# The variance of a group's rewards is computed in fp32, which holds numbers up to 3.4e38: the square of a reward must fit.
LARGEST_REWARD = 1e18
_MAX_PARTS, _MAX_NAME_CHARS = 100, 100


def is_usable(number: float) -> bool:
    """Return whether a reward, or a part of one, is a number to compute with: not NaN, and not beyond what fp32 can hold."""
    return abs(number) <= LARGEST_REWARD  # False for NaN


def check_step(step: Any, max_observation_chars: int | None = None, *, rewarded: bool = True) -> EnvStep:
    """Return ``step`` with plain numbers and messages.

    A truth value and a tensor or array of one element are numbers. Numbers that are not finite pass, because they are counted
    under a reason of their own; ``rewarded=False`` lets None pass, of an environment that gives no reward.
    ``max_observation_chars`` limits all observations together; None is no limit.
    """
    if not isinstance(step, EnvStep):
        raise EnvironmentOutputError(f"the environment's step gave {_shown(step)}, not an EnvStep")
    parts = {_part_name(name): _number(f"reward_parts[{name!r}]", value) for name, value in _parts(step.reward_parts)}
    observations = _observations(step.observations, max_observation_chars)
    privileged = _privileged(step.privileged, max_observation_chars)
    reward = None if step.reward is None and not rewarded else _number("reward", step.reward)
    return EnvStep(observations, reward, _flag(step.done), parts, privileged)


def _privileged(value: Any, max_chars: int | None) -> str | None:
    """Return the text; None where it has no words."""
    if value is None:
        return None
    if not isinstance(value, str) or (max_chars is not None and len(value) > max_chars):
        raise EnvironmentOutputError(f"privileged is {_shown(value)}, not a text of at most {max_chars} characters or None")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise EnvironmentOutputError(f"privileged holds what is no text: {error}") from error
    return value if value.strip() else None


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, Mapping) or len(value) > _MAX_PARTS:
        raise EnvironmentOutputError(f"reward_parts is {_shown(value)}, not at most {_MAX_PARTS} names with numbers")
    return list(value.items())


def _part_name(name: Any) -> str:
    """Return the name of a part of a reward; it becomes a key of metrics.jsonl."""
    if not isinstance(name, str) or len(name) > _MAX_NAME_CHARS or not name.isprintable():
        raise EnvironmentOutputError(
            f"reward_parts has the name {_shown(name)}, which is not at most {_MAX_NAME_CHARS} printable characters"
        )
    return name


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, str | bytes):  # float("1.0") is a number too, but a text is not meant as a reward
            return float(value)
    except OverflowError:  # a whole number that is larger than every float
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        pass
    raise EnvironmentOutputError(f"{name} is {_shown(value)}, not a number")


def _flag(value: Any) -> bool:
    try:
        if not isinstance(value, str | bytes) and value in (True, False):  # numpy's too
            return bool(value)
    except (TypeError, ValueError, RuntimeError):  # a vector is neither true nor false
        pass
    raise EnvironmentOutputError(f"done is {_shown(value)}, not True or False")


def _observations(value: Any, max_chars: int | None) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise EnvironmentOutputError(f"observations is {_shown(value)}, not a list of messages")
    if not value:
        return []
    if max_chars is not None and _is_longer(value, max_chars):
        raise EnvironmentOutputError(
            f"the observations have more than max_observation_chars={max_chars} characters; raise that key, or shorten them in "
            "the environment"
        )
    try:
        messages = check_messages(list(value), "the environment's answer", "observations")
    except InputError as error:
        raise EnvironmentOutputError(str(error)) from error
    for message in messages:
        if message["role"] == "assistant":
            raise EnvironmentOutputError("an observation has the role assistant, whose turns only the policy writes")
        try:
            message_text(message).encode()
        except UnicodeEncodeError as error:  # half a surrogate pair: no tokenizer takes it
            raise EnvironmentOutputError(f"an observation holds what is no text: {error}") from error
    return [{key: value for key, value in message.items() if _is_plain(value)} for message in messages]


def _is_plain(value: Any) -> bool:
    """Return whether JSON can hold a field of a message: files of traces and of checkpoints keep whole messages."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_longer(value: Any, max_chars: int) -> bool:
    """Return whether the texts in nested lists and mappings are longer than the limit, after at most ``max_chars`` steps.

    Every item counts as one character, so that the walk also ends where a list contains itself.
    """
    chars, left = 0, [value]
    while left:
        item = left.pop()
        chars += len(item) if isinstance(item, str | bytes) else 1
        if chars > max_chars:
            return True
        if isinstance(item, Mapping):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            left += item
    return False


def _shown(value: Any) -> str:
    return "None" if value is None else f"{bounded_repr(value)} ({type(value).__name__})"
