"""Environments: what answers an assistant turn, and what it is worth."""

from pidistill.envs.base import (
    Environment,
    EnvironmentCrash,
    EnvironmentOutputError,
    EnvironmentTimeout,
    EnvStep,
    check_step,
)
from pidistill.envs.leak_penalty import LeakPenalty
from pidistill.envs.process import ProcessEnvironment
from pidistill.envs.single_turn import SingleTurn

__all__ = [
    "EnvStep",
    "Environment",
    "EnvironmentCrash",
    "EnvironmentOutputError",
    "EnvironmentTimeout",
    "LeakPenalty",
    "ProcessEnvironment",
    "SingleTurn",
    "check_step",
]
