"""Sample completions and play episodes.

In: examples with their prompt pairs, a model, a sampler and an environment.
Out: :class:`~pidistill.types.Rollout` objects with rewards, and counts of the episodes that have none, by reason.

Read collect.py first: all episodes of a round. episode.py plays one of them, and is the place where faults of a user's code are
caught; calls.py has time limits and threads. base.py says what a sampler is, request.py what samplers have in common;
torchtune_sampler.py with decoding.py and distribution.py is one sampler, vllm_sampler.py with vllm_engine.py the other.
progress.py shows how far a round is. selections.py and hints.py choose rollouts to write as rows.
"""

from pidistill.rollouts.base import OnTurnEnd, Sample, Sampler
from pidistill.rollouts.collect import DROP_REASONS, CollectResult, collect_rollouts, rollout_seed
from pidistill.rollouts.decoding import gathered_parameters
from pidistill.rollouts.torchtune_sampler import TorchtuneSampler
from pidistill.rollouts.vllm_sampler import VLLMSampler
