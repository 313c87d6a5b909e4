"""The environment protocol: one stateless object serves many episodes, each with its own state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from pidistill.chat.messages import check_messages, message_text
from pidistill.errors import InputError
from pidistill.types import Example, Message


@dataclass
class EnvStep:
    """What an environment answers to one assistant turn.

    Attributes:
        observations: messages forced into the context before the next turn; empty when ``done``.
        reward: added to the episode's reward.
        done: the episode ends here.
        reward_parts: named parts of ``reward``, for the log.
    """

    observations: list[Message]
    reward: float
    done: bool
    reward_parts: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Environment(Protocol):
    def reset(self, example: Example) -> Any:
        """Start an episode on ``example`` and return its state."""

    def step(self, state: Any, turn: Message, *, truncated: bool) -> EnvStep:
        """Answer one assistant turn, changing ``state`` in place.

        ``truncated``: the turn hit the token limit before its end-of-turn token; the episode ends whatever is answered.
        With ``environment_threads`` or ``environment_timeout_s`` this is called from several threads, each episode from one
        at a time.
        """


class EnvironmentTimeout(Exception):
    """No answer in time: `environment_timeout`. An environment with limits of its own may raise it."""


class EnvironmentCrash(Exception):
    """What the environment ran in has died: `environment_crash`. One that talks to a sandbox may raise it."""


class EnvironmentOutputError(Exception):
    """What came back is no answer: `environment_output`."""


def check_step(step: Any) -> EnvStep:
    """``step`` with plain numbers and messages, or an EnvironmentOutputError that says what is wrong with it.

    Numbers that are not finite pass: they have a reason of their own.
    """
    if not isinstance(step, EnvStep):
        raise EnvironmentOutputError(f"the environment's step gave {_shown(step)}, not an EnvStep")
    if not isinstance(step.reward_parts, Mapping) or not all(isinstance(name, str) for name in step.reward_parts):
        raise EnvironmentOutputError(f"reward_parts is {_shown(step.reward_parts)}, not names with numbers")
    parts = {name: _number(f"reward_parts[{name!r}]", value) for name, value in step.reward_parts.items()}
    observations = _observations(step.observations)
    return EnvStep(observations, _number("reward", step.reward), _flag(step.done), parts)


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, str | bytes):  # float("1.0") is a number; that a text holds one is chance
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise EnvironmentOutputError(f"{name} is {_shown(value)}, not a number")


def _flag(value: Any) -> bool:
    try:
        if not isinstance(value, str | bytes) and value in (True, False):  # numpy's too
            return bool(value)
    except (TypeError, ValueError, RuntimeError):  # a vector is neither
        pass
    raise EnvironmentOutputError(f"done is {_shown(value)}, not True or False")


def _observations(value: Any) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise EnvironmentOutputError(f"observations is {_shown(value)}, not a list of messages")
    if not value:
        return []
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
    return messages


def _shown(value: Any) -> str:
    return f"{value!r:.80} ({type(value).__name__})" if value is not None else "None"
