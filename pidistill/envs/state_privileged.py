"""Let a function of the environment's state give the teacher's information of each turn (state-matched, SMRC-SD 2608.05219)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pidistill.components import resolve
from pidistill.envs.base import Environment, EnvStep, judge_unfinished
from pidistill.envs.process import ProcessEnvironment
from pidistill.envs.routed import RoutedEnvironment
from pidistill.errors import InputError
from pidistill.types import Example, Message


class StatePrivileged:
    """Play ``environment``, and give what ``text`` says of the state after each turn as ``EnvStep.privileged``.

    The first turn's information is the row's own, since its prompt is made before the episode begins.

    Attributes:
        environment: answers the turns.
        gives_privileged: says before anything is built that rows need no information of their own.
        text: a function of the state, or its dotted path; returns a text, or None where it has nothing to say.
    """

    gives_privileged = True

    def __init__(self, environment: Environment, text: str | Callable[[Any], str | None]) -> None:
        self.environment, self.text = environment, resolve(text) if isinstance(text, str) else text
        if not callable(self.text):
            raise InputError(f"environment.text={text} is no function; give one of the state that returns a text or None")
        if _runs_in_processes(environment):
            raise InputError(
                "environment.text would be given the pickled state of a ProcessEnvironment, which it cannot read; exchange the "
                "two: put StatePrivileged under the key `environment` of ProcessEnvironment"
            )

    def reset(self, example: Example) -> Any:
        return self.environment.reset(example)

    def step(self, state: Any, turn: Message, *, truncated: bool) -> EnvStep:
        step = self.environment.step(state, turn, truncated=truncated)
        return step if step.done else replace(step, privileged=self.text(state))

    def unfinished(self, state: Any) -> EnvStep:
        return judge_unfinished(self.environment, state)


def _runs_in_processes(environment: Environment) -> bool:
    """Return whether an episode's state is kept by a ProcessEnvironment, also one that plays only some rows."""
    if isinstance(environment, RoutedEnvironment):
        return any(map(_runs_in_processes, environment.environments.values()))
    return isinstance(environment, ProcessEnvironment)
