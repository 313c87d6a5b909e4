"""A round: prompts sampled together, then one or more optimiser steps on their rollouts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from pidistill.adapters import has_adapters
from pidistill.config import empty_model
from pidistill.divergences import check_divergence
from pidistill.errors import InputError
from pidistill.objectives.base import Objective
from pidistill.rollouts import Sampler
from pidistill.teachers import NO_ADAPTERS, AdapterOffTeacher, EMATeacher, Teacher
from pidistill.training import crossed, write_jsonl
from pidistill.types import Rollout, RolloutAdvantage, ViewName

ROUND_KEYS = frozenset(
    {
        "prompts_per_round", "group_size", "updates_per_round", "minibatch_rollouts", "objective",
        "teacher", "teacher_model", "teacher_checkpointer", "teacher_tokenizer", "rollout_log_steps", "rollout_log_samples",
        "rollout_log_max_new_tokens", "rollout_log_max_chars", "sft_weight", "sft_batch_size", "max_sampler_mismatch_nats",
        "importance_weights",
    }
)  # fmt: skip


@dataclass(frozen=True)
class TextLog:
    """Every ``steps`` steps, ``samples`` rows answered in both views; 0 steps is never."""

    steps: int
    samples: int
    max_new_tokens: int | None
    max_chars: int


class Round:
    """Sizes of a round, counted over all ranks, and how its rollouts are cut into steps.

    Config keys: ``prompts_per_round`` × ``group_size`` rollouts are sampled, then ``updates_per_round`` optimiser steps are
    taken, each on ``minibatch_rollouts`` of them (null: on all).
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.prompts: int = cfg.prompts_per_round
        self.group_size: int = cfg.group_size
        self.updates: int = cfg.get("updates_per_round") or 1
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
        self.texts = TextLog(
            steps=int(cfg.get("rollout_log_steps") or 0),
            samples=int(cfg.get("rollout_log_samples") or 2),
            max_new_tokens=cfg.get("rollout_log_max_new_tokens"),
            max_chars=int(cfg.get("rollout_log_max_chars") or 2000),
        )

    @property
    def must_match(self) -> dict[str, int]:
        """What the position in the data depends on; a resumed run must have the same."""
        return {"prompts_per_round": self.prompts, "group_size": self.group_size, "updates_per_round": self.updates}

    def check_progress(self, step: int, round_: int, max_steps: int) -> None:
        """Refuse to extend a run that `max_steps` ended inside a round: that round's rollouts are gone."""
        if step < max_steps and step != round_ * self.updates:
            raise InputError(
                f"the checkpoint at step {step} ended inside a round of {self.updates} updates, and cannot be continued "
                "exactly; resume from a run whose max_steps was a multiple of updates_per_round"
            )

    def minibatches(self, pairs: Sequence[tuple[Rollout, RolloutAdvantage]]) -> Iterator[list]:
        """One list per optimiser step of the round: this rank's rollouts of the groups that belong to it, groups in turn."""
        groups = self.minibatch // self.group_size
        for update in range(self.updates):
            chosen = {(update * groups + i) % self.prompts for i in range(groups)}
            yield [pair for pair in pairs if pair[0].group in chosen]

    def eval_due(self, before: int, now: int) -> bool:
        return crossed(self._eval_every, before, now)

    def texts_due(self, before: int, now: int) -> bool:
        return crossed(self.texts.steps, before, now)


RECIPE_OF_VIEW: dict[ViewName, str] = {"teacher": "pi_distill_distributed", "student": "opsd_distributed"}


def check_method(cfg: DictConfig, objective: Objective, sampler: Sampler, teacher: Teacher, sampling_view: ViewName) -> None:
    """Refuse parts that are right by themselves and train the wrong thing together."""
    if sampler.temperature == 0:
        raise InputError(
            "sampler.temperature=0 always takes the likeliest token, and samples without probabilities cannot be trained on; "
            "set it above 0 (evaluation samples greedily by itself)"
        )
    method = cfg.objective._component_.rpartition(".")[2]
    if objective.sampling_view() != sampling_view:
        recipe = RECIPE_OF_VIEW[objective.sampling_view()]
        raise InputError(
            f"{method} trains on what the {objective.sampling_view()} view samples, and this recipe samples from the "
            f"{sampling_view} view; run {recipe}, or set another objective"
        )
    if not teacher.live and not objective.uses_teacher:
        raise InputError(f"{method} never looks at a teacher; remove `teacher`, or set objective.report_teacher_kl=True")
    if cfg.get("teacher_model") and not cfg.get("teacher_checkpointer"):
        raise InputError("teacher_model needs a teacher_checkpointer: the student's weights are not the teacher's")
    if isinstance(teacher, EMATeacher) and has_own_teacher(cfg):
        raise InputError("an EMA teacher averages the student's own weights; remove teacher_model and teacher_checkpointer")
    for key in ("teacher_model", "teacher_checkpointer", "teacher_tokenizer"):
        if not teacher.own_weights and cfg.get(key):
            raise InputError(
                f"config key {key} is read by nothing while the trained model is the teacher; remove it, or set "
                "teacher._component_=pidistill.teachers.FrozenTeacher"
            )
    steps = range(int(cfg.max_steps))
    if not teacher.can_sample and any(objective.samples_from_teacher_weights(step) for step in steps):
        raise InputError(
            f"{type(teacher).__name__} mixes the logits of two models and cannot sample, which {method} asks of the teacher "
            "(at alpha=0); keep objective.alpha above 0, or set another teacher"
        )
    if objective.on_policy_frac < 1.0 and cfg.group_size != 1:
        raise InputError(
            f"objective.lmbda={objective.on_policy_frac} answers some prompts once, from the dataset, and group_size="
            f"{cfg.group_size} the others several times, so lmbda would not be the share of either; set group_size=1 and raise "
            "prompts_per_round"
        )
    if cfg.get("importance_weights") and not objective.takes_importance_weights:
        raise InputError(
            f"{method} as configured has no policy-gradient loss for importance_weights to multiply (a divergence, a "
            "supervised term, or importance weights of its own); remove importance_weights, or set another objective"
        )
    if cfg.get("hindsight"):
        _check_hindsight(cfg, objective, method)
    for request in objective.score_request(0).divergences:
        check_divergence(request)
    _check_adapters(empty_model(cfg.model), teacher)


def _check_hindsight(cfg: DictConfig, objective: Objective, method: str) -> None:
    if not objective.uses_teacher:
        raise InputError(f"{method} never looks at a teacher, so nobody would see what hindsight finds; remove `hindsight`")
    if cfg.privileged.get("control") == "none" and objective.no_pi in ("drop", "error"):
        raise InputError(
            f"privileged.control=none takes hindsight from every rollout, and objective.no_pi={objective.no_pi} leaves nothing "
            "to train; set objective.no_pi=rl or distill"
        )


def _check_adapters(model: nn.Module, teacher: Teacher) -> None:
    if isinstance(teacher, AdapterOffTeacher) and not has_adapters(model):
        raise InputError(NO_ADAPTERS)
    if any(getattr(module, "attn_dropout", 0) or (isinstance(module, nn.Dropout) and module.p) for module in model.modules()):
        raise InputError(
            "dropout in the training forward would score another policy than the one that sampled; set model.lora_dropout=0 "
            "and model.attn_dropout=0"
        )


def has_own_teacher(cfg: DictConfig) -> bool:
    return bool(cfg.get("teacher_model") or cfg.get("teacher_checkpointer"))


def no_pi(cfg: DictConfig, objective: Objective) -> str:
    """What happens to rows without privileged information. Another model teaches without it: every row distils."""
    if has_own_teacher(cfg):
        objective.no_pi = "distill"
    return objective.no_pi


def check_rewards(rollouts: float, dropped: Mapping[str, float]) -> None:
    """Refuse to go on if a whole round has no rollout with a reward: no later one would fare better."""
    if rollouts == 0:
        reasons = ", ".join(f"{reason} {count:g}" for reason, count in dropped.items() if count)
        raise InputError(
            f"no rollout of the round has a reward ({reasons}); the warning above names the first: mend `environment`"
        )


def dump_rollouts(rollouts: Sequence[Rollout], path: Path) -> None:
    """One JSON object per rollout: enough to see what a step was trained on."""
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
