"""Environments: what answers an assistant turn, and what it is worth."""

from pidistill.envs.base import Environment, EnvironmentCrash, EnvironmentOutputError, EnvironmentTimeout, EnvStep, check_step
from pidistill.envs.function_tools import FunctionToolEnvironment
from pidistill.envs.gem import GEMEnvironment, gem_dataset
from pidistill.envs.process import ProcessEnvironment
from pidistill.envs.reasoning_gym import ReasoningGymEnvironment, reasoning_gym_dataset
from pidistill.envs.replay import ReplayEnvironment
from pidistill.envs.single_turn import SingleTurn

__all__ = [
    "EnvStep",
    "Environment",
    "EnvironmentCrash",
    "EnvironmentOutputError",
    "EnvironmentTimeout",
    "FunctionToolEnvironment",
    "GEMEnvironment",
    "ProcessEnvironment",
    "ReasoningGymEnvironment",
    "ReplayEnvironment",
    "SingleTurn",
    "check_step",
    "gem_dataset",
    "reasoning_gym_dataset",
]
