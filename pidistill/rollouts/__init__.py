"""Prompts in, rollouts out: samplers, and the loop between a sampler and an environment."""

from pidistill.rollouts.base import OnTurnEnd, Sample, Sampler
from pidistill.rollouts.collect import DROP_REASONS, CollectResult, collect_rollouts, rollout_seed
from pidistill.rollouts.decoding import gathered_parameters
from pidistill.rollouts.torchtune_sampler import TorchtuneSampler
from pidistill.rollouts.vllm_sampler import VLLMSampler

__all__ = [
    "DROP_REASONS",
    "CollectResult",
    "OnTurnEnd",
    "Sample",
    "Sampler",
    "TorchtuneSampler",
    "VLLMSampler",
    "collect_rollouts",
    "gathered_parameters",
    "rollout_seed",
]
