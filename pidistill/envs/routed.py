"""Let a key of each row name the environment that plays it: several kinds of tasks in one run."""

from collections.abc import Mapping
from typing import Any

from pidistill.data.routes import route_of
from pidistill.envs.base import Environment, EnvStep, judge_unfinished
from pidistill.errors import InputError
from pidistill.types import Example, Message


class RoutedEnvironment:
    """Play each row in the environment that its key names.

    Attributes:
        key: where a row says it, a key of ``Example.data``; see :func:`pidistill.data.joined_dataset`.
        environments: name → environment.
        default: the name for rows without the key; None refuses such a row.
    """

    def __init__(self, key: str, environments: Mapping[str, Environment], default: str | None = None) -> None:
        self.key, self.default = key, None if default is None else str(default)
        self.environments = {str(name): environment for name, environment in environments.items()}
        if not self.environments or (self.default is not None and self.default not in self.environments):
            known = ", ".join(self.environments) or "none"
            raise InputError(f"environment.default={default} must be null or one of environment.environments ({known})")

    def reset(self, example: Example) -> tuple[str, Any]:
        name = route_of(example, self.key, self.environments, self.default, "environment")
        return name, self.environments[name].reset(example)

    def step(self, state: tuple[str, Any], turn: Message, *, truncated: bool) -> EnvStep:
        name, own = state
        return self.environments[name].step(own, turn, truncated=truncated)

    def unfinished(self, state: tuple[str, Any]) -> EnvStep:
        name, own = state
        return judge_unfinished(self.environments[name], own)
