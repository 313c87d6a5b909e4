"""Divide and report a round: prompts sampled together, then one or more optimiser steps on their rollouts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from pidistill.data import RecipeData
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.jsonl import write_jsonl
from pidistill.rollouts import DROP_REASONS
from pidistill.scoring.mismatch import TruncatedImportanceWeights
from pidistill.training.keys import setting
from pidistill.training.metrics import advantage_sums, rollout_means, rollout_sums
from pidistill.training.update import crossed
from pidistill.types import Rollout, RolloutAdvantage


class RoundSizes:
    """Hold the sizes of a round, counted over all ranks, and divide its rollouts into steps.

    Config keys: ``prompts_per_round`` × ``group_size`` rollouts are sampled, then ``updates_per_round`` optimiser steps are
    taken, each on ``minibatch_rollouts`` of them (null: on all).
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.prompts: int = cfg.prompts_per_round
        self.group_size: int = cfg.group_size
        self.updates: int = setting(cfg, "updates_per_round")
        self.minibatch: int = cfg.get("minibatch_rollouts") or self.prompts * self.group_size
        if self.minibatch % self.group_size or self.minibatch > self.prompts * self.group_size:
            raise InputError(
                f"minibatch_rollouts={self.minibatch} must be a multiple of group_size={self.group_size} and at most "
                f"prompts_per_round × group_size = {self.prompts * self.group_size}; groups are not split between steps"
            )
        if self.minibatch * self.updates < self.prompts * self.group_size:
            raise InputError(
                f"updates_per_round={self.updates} × minibatch_rollouts={self.minibatch} leaves some of the round's "
                f"{self.prompts * self.group_size} rollouts untrained; raise one of them"
            )
        self.score_chunk_tokens = cfg.get("score_chunk_tokens")
        self._eval_every = cfg.get("eval_every_steps")

    @property
    def must_match(self) -> dict[str, int]:
        """Return what the position in the data depends on; a resumed run must have the same."""
        return {"prompts_per_round": self.prompts, "group_size": self.group_size, "updates_per_round": self.updates}

    def check_progress(self, step: int, round_: int, max_steps: int) -> None:
        """Refuse to extend a run that `max_steps` ended inside a round: that round's rollouts are gone."""
        if step < max_steps and step != round_ * self.updates:
            raise InputError(
                f"the checkpoint at step {step} ended inside a round of {self.updates} updates, and cannot be continued "
                "exactly; resume from a run whose max_steps was a multiple of updates_per_round"
            )

    def minibatches(self, pairs: Sequence[tuple[Rollout, RolloutAdvantage]]) -> Iterator[list]:
        """Yield one list per optimiser step of the round: this rank's rollouts of the groups that belong to it, in turn."""
        groups = self.minibatch // self.group_size
        for update in range(self.updates):
            chosen = {(update * groups + i) % self.prompts for i in range(groups)}
            yield [pair for pair in pairs if pair[0].group in chosen]

    def eval_due(self, before: int, now: int) -> bool:
        return crossed(self._eval_every, before, now)


def round_report(
    run: Run,
    data: RecipeData,
    rollouts: Sequence[Rollout],
    advantages: Sequence[RolloutAdvantage],
    counts: Mapping[str, float],
    importance: TruncatedImportanceWeights | None,
) -> dict[str, float]:
    """Return the numbers of a round, over all ranks; every step of the round reports them.

    Args:
        rollouts, advantages: this rank's; completions of the dataset among them have no reward, and are not averaged.
        counts: over all ranks: rollouts left out, by reason, and what else the recipe has counted.
    """
    pairs = list(zip(rollouts, advantages, strict=True))
    sampled = [(rollout, advantage) for rollout, advantage in pairs if rollout.reward is not None]
    sums = rollout_sums([rollout for rollout, _ in sampled], data.success_threshold, data.leak_phrases)
    sums = run.sums(sums | advantage_sums(sampled) | {"_present": float(len(rollouts))})
    dropped = {reason: counts[reason] for reason in DROP_REASONS}
    check_rewards(sums["_present"], dropped)
    report = rollout_means(sums) | {name: count for name, count in counts.items() if name not in dropped}
    if "_with_pi" in report:
        report["rollouts_with_pi_frac"] = report.pop("_with_pi") / max(1.0, sums["_rollouts"])
    report |= {f"dropped/{reason}": count for reason, count in dropped.items()}
    report |= importance.report(run) if importance is not None else {}
    return report | rows_report(data)


def rows_report(data: RecipeData) -> dict[str, float]:
    """Return what became of the training rows: how many were left out, by reason, and how many lack privileged information."""
    dropped = {f"dropped_rows/{reason}": count for reason, count in data.dropped.items()}
    return dropped | {"rows_without_pi": data.rows_without_pi}


def check_rewards(rollouts: float, dropped: Mapping[str, float], where: str = "of the round") -> None:
    """Refuse a round in which no rollout has a reward: the next round would have none either. Counts are over all ranks."""
    if rollouts == 0:
        reasons = ", ".join(f"{reason} {count:g}" for reason, count in dropped.items() if count) or "none was sampled"
        raise InputError(
            f"no rollout {where} has a reward ({reasons}); the warning above says what went wrong in the first one: correct "
            "`environment`, its reward or `reward_shaping`"
        )


def dump_rollouts(rollouts: Sequence[Rollout], path: Path) -> None:
    """Write one JSON object per rollout: enough to see what a step was trained on."""
    write_jsonl(
        path,
        [
            {
                "example": r.example.id,
                "group": r.group,
                "sampled_by": r.sampled_by,
                "student_prompt": r.prompts.student,
                "teacher_prompt": r.prompts.teacher,
                "completion": r.completion,
                "policy_mask": r.policy_mask,
                "sampled_logprobs": [x if m else None for x, m in zip(r.sampled_logprobs or [], r.policy_mask, strict=False)],
                "reward": r.reward,
                "stop_reason": r.stop_reason,
            }
            for r in rollouts
        ],
    )
