"""Environments: what answers an assistant turn, and what it is worth."""

from pidistill.envs.base import Environment, EnvStep
from pidistill.envs.replay import ReplayEnvironment
from pidistill.envs.single_turn import SingleTurn

__all__ = ["EnvStep", "Environment", "ReplayEnvironment", "SingleTurn"]
