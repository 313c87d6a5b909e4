"""Divide and report a round: prompts sampled together, then one or more optimiser steps on their rollouts."""

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path

from omegaconf import DictConfig
from torchtune.utils import get_logger, log_rank_zero

from pidistill.components import resolve
from pidistill.data import RecipeData, epoch_order
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.jsonl import write_jsonl
from pidistill.objectives import GRPO
from pidistill.rollouts import DROP_REASONS
from pidistill.scoring.mismatch import Corrections
from pidistill.training.interrupts import FailedBetweenUpdates
from pidistill.training.keys import setting
from pidistill.training.metrics import advantage_sums, rollout_means, rollout_sums
from pidistill.training.update import crossed
from pidistill.types import Rollout, RolloutAdvantage, ViewName

_log = get_logger("INFO")


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
        _warn_of_half_a_round(cfg.get("max_steps"), self.updates)
        self._eval_every = cfg.get("eval_every_steps")
        self._refills = _refill_batches(cfg)
        self._curriculum = _turn_curriculum(cfg)

    @property
    def must_match(self) -> dict[str, int]:
        """Return what the position in the data depends on; a resumed run must have the same."""
        return {"prompts_per_round": self.prompts, "group_size": self.group_size, "updates_per_round": self.updates}

    def first_step(self, round_: int) -> int:
        """Return the number of optimiser steps before a round."""
        return round_ * self.updates

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

    def turn_limit(self, step: int) -> int | None:
        """Return how many assistant turns an episode may have at this step, start + ⌊step / every⌋; None without a limit."""
        return None if self._curriculum is None else self._curriculum[0] + step // self._curriculum[1]

    def refill(
        self,
        run: Run,
        round_: int,
        rows: int,
        rollouts: list[Rollout],
        sample: Callable[[list[tuple[int, int]], ViewName, int], list[Rollout]],
        counts: MutableMapping[str, float],
    ) -> list[Rollout]:
        """Sample other rows in place of groups whose rewards are all equal, until none is left or the batches are used up.

        What is replaced stays in the round's reports and gets a group number that no step trains on. Which rows come instead
        depends on the seed, the round and the group's number alone, so that a resumed run draws the same ones.
        """
        if self._refills:
            counts["refilled_groups"] = 0.0
        for batch in range(self._refills):
            uniform = _uniform_groups(rollouts, self.prompts)
            if not run.sum(len(uniform)):
                break
            first = (round_ * self._refills + batch) * self.prompts
            order = epoch_order(rows, run.seed + REFILL_SEED, first, self.prompts)
            for rollout in rollouts:
                if rollout.group in uniform:
                    rollout.group += self.prompts * (batch + 1)
            counts["refilled_groups"] += len(uniform)
            rollouts = rollouts + sample([(g, order[g]) for g in uniform], "student", self.group_size * (batch + 1))
        if self._refills:
            counts["uniform_groups"] = float(len(_uniform_groups(rollouts, self.prompts)))
        return rollouts

    def eval_due(self, before: int, now: int) -> bool:
        return crossed(self._eval_every, before, now)


def _warn_of_half_a_round(max_steps: int | None, updates: int) -> None:
    if max_steps is not None and max_steps % updates:
        whole = [str(steps) for steps in (max_steps - max_steps % updates, max_steps - max_steps % updates + updates) if steps]
        log_rank_zero(
            _log,
            f"max_steps={max_steps} ends inside a round of updates_per_round={updates}, and such a run cannot be extended; "
            f"{' or '.join(whole)} can",
            level=logging.WARNING,
        )


REFILL_SEED = 2**31  # another order of the rows than that of the rounds


def _refill_batches(cfg: DictConfig) -> int:
    """Return how many further batches a round may sample in place of groups without a difference; 0 without `refill`."""
    refill = cfg.get("refill")
    if refill is None:
        return 0
    most = refill.get("max_batches")
    if set(refill) != {"max_batches"} or type(most) is not int or not 1 <= most <= 100:
        raise InputError(f"refill={dict(refill)} must be {{max_batches: N}}, N from 1 to 100 batches beside the round's first")
    if resolve(cfg.objective._component_) is not GRPO:
        raise InputError(
            f"refill replaces groups whose rewards are all equal, and {cfg.objective._component_} also learns from them; "
            "remove refill, or set objective._component_=pidistill.objectives.GRPO"
        )
    return most


def _turn_curriculum(cfg: DictConfig) -> tuple[int, int] | None:
    """Return (start, every) of `turn_curriculum`; None where there is none."""
    node = cfg.get("turn_curriculum")
    if node is None:
        return None
    start, every = node.get("start"), node.get("every")
    if set(node) != {"start", "every"} or any(type(x) is not int or x < 1 for x in (start, every)):
        raise InputError(
            f"turn_curriculum={dict(node)} must be {{start: turns at first, every: steps for one turn more}}, whole numbers of "
            "at least 1"
        )
    if cfg.get("hindsight") or cfg.get("refill") or resolve(cfg.objective._component_).guides_failed_groups:
        raise InputError(
            "turn_curriculum ends episodes without a reward, and hindsight, refill and Guide-GRPO choose by rewards; remove one"
        )
    parts = [cfg.objective, *(cfg.objective.get("objectives") or {}).values()]
    if any(part.get("student_term") == "snis" for part in parts):
        raise InputError(
            "turn_curriculum ends episodes without a reward, and objective.student_term=snis weighs every rollout by its "
            "reward; remove turn_curriculum, or set objective.student_term=ppo"
        )
    return start, every


def _uniform_groups(rollouts: Sequence[Rollout], groups: int) -> list[int]:
    """Return the groups below ``groups`` whose rollouts all have the same reward, in ascending order."""
    rewards: dict[int, set[float | None]] = {}
    for rollout in rollouts:
        rewards.setdefault(rollout.group, set()).add(rollout.reward)
    return sorted(group for group, found in rewards.items() if len(found) == 1 and group < groups)


def round_report(
    run: Run,
    data: RecipeData,
    rollouts: Sequence[Rollout],
    advantages: Sequence[RolloutAdvantage],
    counts: Mapping[str, float],
    corrections: Corrections | None,
) -> dict[str, float]:
    """Return the numbers of a round, over all ranks; every step of the round reports them.

    Args:
        rollouts, advantages: this rank's; completions of the dataset and episodes that `turn_curriculum` ended are left out.
        counts: over all ranks: rollouts left out, by reason, and what else the recipe has counted.
    """
    pairs = list(zip(rollouts, advantages, strict=True))
    sampled = [(r, advantage) for r, advantage in pairs if r.sampled_logprobs is not None and r.stop_reason != "curriculum"]
    sums = rollout_sums([rollout for rollout, _ in sampled], data.success_threshold, data.leak_phrases)
    sums = run.sums(sums | advantage_sums(sampled) | {"_present": float(len(rollouts))})
    dropped = {reason: counts[reason] for reason in DROP_REASONS}
    check_rewards(sums["_present"], dropped)
    report = rollout_means(sums) | {name: count for name, count in counts.items() if name not in dropped}
    if "_with_pi" in report:
        report["rollouts_with_pi_frac"] = report.pop("_with_pi") / max(1.0, sums["_rollouts"])
    report |= {f"dropped/{reason}": count for reason, count in dropped.items()}
    report |= corrections.report(run) if corrections is not None else {}
    return report | rows_report(data)


def rows_report(data: RecipeData) -> dict[str, float]:
    """Return what became of the training rows: how many were left out, by reason, and how many lack privileged information."""
    dropped = {f"dropped_rows/{reason}": count for reason, count in data.dropped.items()}
    return dropped | {"rows_without_pi": data.rows_without_pi}


def check_rewards(rollouts: float, dropped: Mapping[str, float], where: str = "of the round") -> None:
    """Refuse a round in which no rollout has a reward: the next round would have none either. Counts are over all ranks."""
    if rollouts == 0:
        reasons = ", ".join(f"{reason} {count:g}" for reason, count in dropped.items() if count) or "none was sampled"
        raise FailedBetweenUpdates(
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
                "teacher_reads": r.teacher_reads,
                "policy_mask": r.policy_mask,
                "sampled_logprobs": [x if m else None for x, m in zip(r.sampled_logprobs or [], r.policy_mask, strict=False)],
                "reward": r.reward,
                "stop_reason": r.stop_reason,
            }
            for r in rollouts
        ],
    )
