"""Environments: what answers an assistant turn, and what it is worth."""

from pidistill.envs.base import Environment, EnvStep
from pidistill.envs.leak_penalty import LeakPenalty
from pidistill.envs.single_turn import SingleTurn
from pidistill.envs.tools import FunctionToolEnvironment

__all__ = ["EnvStep", "Environment", "FunctionToolEnvironment", "LeakPenalty", "SingleTurn"]
