"""Build the collector of a run from its config: the one place where a config says how episodes are played."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from pidistill.config import build
from pidistill.data.load import gives_no_reward, gives_privileged, load_privileged
from pidistill.envs.base import Environment
from pidistill.models.empty import shared_empty_model
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

    It takes one argument more, ``turn_limit``: what `turn_curriculum` allows at this step.

    Args:
        environment: plays the episodes in place of the one that `environment` names.
    """
    privileged = load_privileged(cfg, tokenizer)
    if gives_privileged(cfg.get("environment")):
        privileged.check_turns("environment")
    longest = shared_empty_model(cfg.model).max_seq_len
    collect = functools.partial(
        collect_rollouts,
        sampler=sampler,
        tokenizer=tokenizer,
        environment=build(cfg.environment) if environment is None else environment,
        environment_threads=cfg.get("environment_threads"),
        environment_timeout_s=cfg.get("environment_timeout_s"),
        max_observation_chars=setting(cfg, "max_observation_chars"),
        shaping=build_shaping(cfg.get("reward_shaping")),
        privileged=privileged,
        max_seq_len=min(longest, tokenizer.max_seq_len or longest),
        rewarded=not gives_no_reward(cfg.get("environment")),
    )
    how, most = setting(cfg, "overlong"), cfg.get("max_turns")

    def collect_and_mark(*args: Any, turn_limit: int | None = None, **kwargs: Any) -> CollectResult:
        cut_short = turn_limit is not None and (most is None or turn_limit < most)
        result = collect(*args, **{"max_turns": turn_limit if cut_short else most} | kwargs)
        if how != "train":
            mark_overlong(result.rollouts, how)
        if cut_short:
            mark_cut_short(result.rollouts)
        return result

    return collect_and_mark


def mark_cut_short(rollouts: Sequence[Rollout]) -> None:
    """Take the reward from episodes that `turn_curriculum` ended: they teach by distillation, and have not failed."""
    for rollout in rollouts:
        if rollout.stop_reason == "max_turns":
            rollout.stop_reason, rollout.reward, rollout.task_reward = "curriculum", None, None


def mark_overlong(rollouts: Sequence[Rollout], how: str) -> None:
    """Mark rollouts that a token limit cut off: "mask" takes their tokens out of the loss, "drop" out of the mean too.

    Their rewards stay in the group's mean and in what is reported.
    """
    for rollout in rollouts:
        if rollout.stop_reason in ("length", "turn_length"):
            rollout.keep = how != "drop"
            rollout.loss_weights = [0.0] * rollout.policy_tokens
