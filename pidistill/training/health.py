"""Give alarms: one place decides from the rows of metrics.jsonl whether a run looks lost or teaches nothing.

Each alarm is given once, with its numbers, the likely cause and the key to change, and stands in its row under `alarms`.
"""

import inspect
import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from omegaconf import DictConfig
from torchtune import utils

from pidistill.components import resolve

log = utils.get_logger("INFO")

Row = dict[str, Any]

STEPS = 3  # rows that a mean is taken over, and rows that a repeated fault takes
ZERO_GRADIENT_STEPS = 5
LOST_ENTROPY_NATS = 1e-3
SAME_NATS = 1e-6  # rounding stays below
CORRUPT_KL_NATS = 6.0
CORRUPT_ENTROPY_FRAC = 0.9  # share of ln V
CORRUPT_EXCESS_NATS = 3.0  # the teacher's −log prob of the samples minus the student's
TRUNCATED_FRAC = 0.95
BAD_ROLLOUT_NATS = 1.0  # mean over a rollout's tokens; rounding stays far below
FRESH_CLIP_FRAC = 0.02  # share of the tokens of a round's first update
RULES = ("entropy_lost", "kl_lost", "entropy_rises_success_falls", "gradient_zero", "teacher_is_student", "teacher_corrupt",
         "truncated", "bad_rollout", "fresh_samples_clipped", "no_spread")  # fmt: skip


class Health:
    """Look at the training rows of a run in order; each of the rules is a method that returns an alarm's sentence or None."""

    def __init__(self, cfg: Mapping[str, Any] | DictConfig) -> None:
        self.said: set[str] = set()  # names of the alarms that were given, now or before a resume
        privileged, model = cfg.get("privileged") or {}, cfg.get("teacher_model") or cfg.get("model") or {}
        self._shows_nothing = privileged.get("control") == "none"
        self._group_size = cfg.get("group_size")
        self._truncates_by_rank = bool((cfg.get("sampler") or {}).get("top_k")) and not cfg.get("importance_weights")
        self._reward_free = not reads_rewards(cfg.get("objective") or {})
        self._vocab_size = model.get("vocab_size")
        self._rows: list[Row] = []  # the first STEPS and the last ZERO_GRADIENT_STEPS training rows
        self._rounds: list[float] = []  # zero_advantage_frac of the last rounds
        self._last_round: Any = None

    def replay(self, row: Row) -> None:
        """Take in a row that was written before a resume; what it said is not said again."""
        alarms = row.get("alarms")
        self.said |= set(alarms) if isinstance(alarms, dict) else set()
        self._remember({key: value for key, value in row.items() if isinstance(value, int | float)})

    def look(self, row: Row) -> dict[str, str]:
        """Return the new alarms at this row, by name, and log each."""
        self._remember(row)
        if not _is_training(row):
            return {}
        new = {}
        for name in RULES:
            if name not in self.said and (text := getattr(self, name)(row)) is not None:
                new[name] = f"step {row['step']}: {text}"
                log.warning(f"alarm {name}: {new[name]}")
        self.said |= new.keys()
        return new

    def _remember(self, row: Row) -> None:
        if not _is_training(row):
            return
        self._rows.append(row)
        if len(self._rows) > STEPS + ZERO_GRADIENT_STEPS:
            del self._rows[STEPS]
        if "zero_advantage_frac" in row and (row.get("round") is None or row["round"] != self._last_round):
            self._last_round = row.get("round")
            self._rounds = [*self._rounds, row["zero_advantage_frac"]][-STEPS:]

    def _first(self, key: str) -> float | None:
        return next((row[key] for row in self._rows if key in row), None)

    def _means(self, key: str) -> tuple[float, float] | None:
        """Return the means over the first and over the last STEPS rows; None before there are twice as many."""
        if len(self._rows) < 2 * STEPS or not all(key in row for row in self._rows):
            return None
        return fmean(row[key] for row in self._rows[:STEPS]), fmean(row[key] for row in self._rows[-STEPS:])

    def entropy_lost(self, row: Row) -> str | None:
        entropy = row.get("entropy_nats", 1.0)
        if entropy < LOST_ENTROPY_NATS:
            return (
                f"entropy is {entropy:.1e} nats per token; the policy gives one answer and explores no more; lower "
                "optimizer.lr and start from an earlier checkpoint, or raise sampler.temperature"
            )
        return None

    def kl_lost(self, row: Row) -> str | None:
        start, kl = self._first("kl_teacher_student_nats"), row.get("kl_teacher_student_nats")
        first, reward = self._first("reward_mean"), row.get("reward_mean")
        if not start or start <= SAME_NATS or kl is None or first is None or reward is None:
            return None
        if kl < 0.02 * start and reward <= first:
            return (
                f"kl(teacher||student) fell from {start:.3g} to {kl:.3g} nats, below 2% of its start, and the reward has not "
                f"risen ({first:.3g} to {reward:.3g}); the teacher may have come to ignore the privileged information: lower "
                "objective.beta or optimizer.lr"
            )
        return None

    def entropy_rises_success_falls(self, row: Row) -> str | None:
        key = "success_frac" if "success_frac" in row else "reward_mean"
        entropy, success = self._means("entropy_nats"), self._means(key)
        if entropy is None or success is None or success[0] <= 0:
            return None
        if entropy[1] > 1.5 * entropy[0] + 0.1 and success[1] < 0.5 * success[0]:
            return (
                f"entropy rose from {entropy[0]:.3g} to {entropy[1]:.3g} nats while {key} fell from {success[0]:.3g} to "
                f"{success[1]:.3g} (means of {STEPS} steps); likely the updates are too large: lower optimizer.lr or set "
                "clip_grad_norm, and start from an earlier checkpoint"
            )
        return None

    def gradient_zero(self, row: Row) -> str | None:
        last = self._rows[-ZERO_GRADIENT_STEPS:]
        rows = len(self._rows) >= ZERO_GRADIENT_STEPS and all(r.get("grad_norm") == 0 for r in last)
        if rows and not (self._shows_nothing and self._reward_free):
            return (
                f"the gradient was 0 for {ZERO_GRADIENT_STEPS} steps in a row, so nothing is learned; likely no group has "
                f"rollouts of different reward (zero_advantage_frac {row.get('zero_advantage_frac', 'not given')}) or the "
                "teacher says what the student says; check privileged, raise group_size, or choose rows of other difficulty "
                "with dataset"
            )
        return None

    def teacher_is_student(self, row: Row) -> str | None:
        values = [r.get("kl_teacher_student_nats") for r in self._rows[:STEPS]]
        if self._shows_nothing or len(values) < STEPS or any(kl is None or abs(kl) > SAME_NATS for kl in values):
            return None
        return (
            f"kl(teacher||student) was {max(values):.1e} nats in the first {STEPS} steps: the teacher says exactly what "
            f"the student says (rows_without_pi {row.get('rows_without_pi', 'not given')}); check that privileged puts text "
            "into the teacher's prompt, or set privileged.control=none if that is meant"
        )

    def teacher_corrupt(self, row: Row) -> str | None:
        if len(self._rows) > 1:  # only as the run starts: later a student may have moved away from a good teacher
            return None
        kl = max(row.get(key, 0.0) for key in ("kl_student_teacher_nats", "kl_teacher_student_nats"))
        entropy = row.get("teacher_entropy_nats", 0.0)
        uniform = math.log(self._vocab_size) if self._vocab_size and self._vocab_size > 1 else math.inf
        teacher, student = row.get("teacher_nll_nats", math.nan), row.get("student_nll_nats", math.nan)
        # A teacher that sampled, and whose information says much, is far from the student and finds the samples likelier.
        far = kl > CORRUPT_KL_NATS and not teacher < student
        if far or entropy > CORRUPT_ENTROPY_FRAC * uniform or teacher - student > CORRUPT_EXCESS_NATS:
            known = f" (ln V is {uniform:.3g})" if math.isfinite(uniform) else ""
            return (
                f"the teacher looks corrupt: its entropy is {entropy:.3g} nats{known}, its KL from the "
                f"student {kl:.3g} and its −log prob of the samples {teacher:.3g} nats per token (the student's: "
                f"{student:.3g}); check teacher_checkpointer.checkpoint_dir, teacher_model and the teacher's prompt "
                "(`pidistill preview` shows it)"
            )
        return None

    def truncated(self, row: Row) -> str | None:
        frac = row.get("truncated_frac", 0.0)
        if frac >= TRUNCATED_FRAC:
            return (
                f"{100 * frac:.0f}% of the rollouts were cut off by the token limit (mean length "
                f"{row.get('completion_tokens_mean', float('nan')):.0f}); raise sampler.max_new_tokens, or, if answers do "
                "end before it, check that the tokenizer's stop tokens hold the template's end of turn"
            )
        return None

    def bad_rollout(self, row: Row) -> str | None:
        worst = row.get("sampler_mismatch_rollout_max_nats", 0.0)
        if worst <= BAD_ROLLOUT_NATS:
            return None
        return (
            f"the sampler's log-probs of one rollout are {worst:.3g} nats per token away from the trainer's, while the mean "
            f"over all tokens is {row.get('sampler_mismatch_mean_nats', math.nan):.3g}; with a negative advantage its tokens "
            f"count up to e^{worst:.3g} times; check the sampler, or bound such a rollout with objective.dual_clip or "
            "importance_weights"
        )

    def fresh_samples_clipped(self, row: Row) -> str | None:
        # The ratios of π-Distill's student half and of hinted samples are those of another view, and differ from the start.
        other_view = "student_ratio_mean" in row or row.get("guided_groups")
        if not self._truncates_by_rank or other_view or "sampler_mismatch_mean_nats" not in row:
            return None
        frac = row.get("clip_frac", 0.0)
        if frac <= FRESH_CLIP_FRAC:
            return None
        return (
            f"{100 * frac:.0f}% of the tokens lost their gradient to the clip in a round's first update, where the policy is "
            "still the one that sampled: sampler.top_k cuts off so much mass that the ratio, which is the mass it keeps, is "
            "below objective.clip_low; set importance_weights, or raise sampler.top_k"
        )

    def no_spread(self, row: Row) -> str | None:
        if self._reward_free or len(self._rounds) < STEPS or any(frac < 1 for frac in self._rounds):
            return None
        alone = self._group_size == 1
        cause = "group_size=1 leaves nothing to compare with" if alone else "every group's rollouts have the same reward"
        return (
            f"no rollout of the last {STEPS} rounds had an advantage ({cause}; reward_mean "
            f"{row.get('reward_mean', math.nan):.3g}), so the reward teaches nothing; raise group_size, or choose easier "
            "or harder rows with dataset"
        )


def _is_training(row: Row) -> bool:
    """Return whether a row is of an optimiser step, not of an evaluation."""
    return any(key in row for key in ("loss", "entropy_nats", "kl_teacher_student_nats"))


def reads_rewards(objective: Mapping[str, Any]) -> bool:
    """Return whether the objective has a key `advantage`, and a term for it: the reward reaches the loss."""
    if not objective.get("_component_") or objective.get("reward_weight") == 0:
        return False
    if parts := objective.get("objectives"):
        return any(map(reads_rewards, parts.values()))
    return "advantage" in inspect.signature(resolve(objective["_component_"])).parameters
