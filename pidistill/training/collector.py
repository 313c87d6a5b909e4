"""Build the collector of a run from its config: the one place where a config says how episodes are played."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from pidistill.config import build
from pidistill.envs.base import Environment
from pidistill.rewards import build_shaping
from pidistill.rollouts import CollectResult, Sampler, collect_rollouts
from pidistill.tokenizers import ChatTokenizer
from pidistill.training.keys import setting
from pidistill.types import Rollout

Collect = Callable[..., CollectResult]


def build_collector(
    cfg: DictConfig, sampler: Sampler, tokenizer: ChatTokenizer, environment: Environment | None = None
) -> Collect:
    """Return :func:`pidistill.rollouts.collect_rollouts` with everything filled in that stays the same for a whole run.

    Args:
        environment: plays the episodes in place of the one that `environment` names.
    """
    collect = functools.partial(
        collect_rollouts,
        sampler=sampler,
        tokenizer=tokenizer,
        environment=build(cfg.environment) if environment is None else environment,
        max_turns=cfg.get("max_turns"),
        environment_threads=cfg.get("environment_threads"),
        environment_timeout_s=cfg.get("environment_timeout_s"),
        max_observation_chars=setting(cfg, "max_observation_chars"),
        shaping=build_shaping(cfg.get("reward_shaping")),
    )
    how = setting(cfg, "overlong")

    def collect_and_mark(*args: Any, **kwargs: Any) -> CollectResult:
        result = collect(*args, **kwargs)
        mark_overlong(result.rollouts, how)
        return result

    return collect if how == "train" else collect_and_mark


def mark_overlong(rollouts: Sequence[Rollout], how: str) -> None:
    """Mark rollouts that a token limit cut off: "mask" takes their tokens out of the loss, "drop" out of the mean too.

    Their rewards stay in the group's mean and in what is reported.
    """
    for rollout in rollouts:
        if rollout.stop_reason in ("length", "turn_length"):
            rollout.keep = how != "drop"
            rollout.loss_weights = [0.0] * rollout.policy_tokens
