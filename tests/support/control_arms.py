"""Run the control arms `none` of methods without reward: both sides see the same, so that nothing may be learned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pidistill.objectives.base import Objective
from tests.support.runs import metrics, run, small_config

NONE = {"privileged__control": "none", "lr_scheduler": None, "optimizer__lr": 3e-4, "prompts_per_round": 1} | {
    "sampler__max_new_tokens": 8,
    "group_size": 2,
}
DISTIL = {"objective__no_pi": "distill"}
REWARD_FREE_OPSD = {"objective__reward_weight": 0.0, "objective__advantage": "group_mean"} | DISTIL
OWN_WEIGHTS = {"teacher_model": None, "teacher_checkpointer": None}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # name → the tiny config, and what makes it free of reward
    "pcsd": ("pcsd", DISTIL),
    "pcsd, padded rows": ("pcsd", DISTIL | {"packing": "padded"}),
    "sdft": ("sdft", DISTIL),
    "sdft, mixed precision": ("sdft", DISTIL | {"compute_dtype": "bf16"}),
    "sdft, kl(S||T)": ("sdft", DISTIL | {"objective__divergence": "kl_student_teacher"}),
    "opsd_ucla, jsd": ("opsd_ucla", DISTIL),
    "opsd_ucla, clipped entries": (
        "opsd_ucla",
        DISTIL | {"objective__divergence": "kl_teacher_student", "objective__entry_clip": 0.05},
    ),
    "opsd_ucla, own divergence": ("opsd_ucla", DISTIL | {"objective__divergence": "tests.support.own_divergences.renyi"}),
    "gkd, half off-policy": ("gkd", DISTIL | {"group_size": 1, "prompts_per_round": 2, "objective__lmbda": 0.5}),
    "gkd, beta 0": ("gkd", DISTIL | {"group_size": 1, "prompts_per_round": 2, "objective__beta": 0.0}),
    "opd, sampled": ("opd", OWN_WEIGHTS),
    "opd, top-k": ("opd", OWN_WEIGHTS | {"objective__divergence": "kl_student_teacher", "objective__top_k": 5}),
    "opd_ppo": ("opd_ppo", DISTIL | {"objective__beta": 0.0}),
    "opsd, loss_rb": ("opsd", REWARD_FREE_OPSD),
    "opsd, loss_rb_complete": ("opsd", REWARD_FREE_OPSD | {"objective__kl_mode": "loss_rb_complete"}),
    "opsd, loss_k2": ("opsd", REWARD_FREE_OPSD | {"objective__kl_mode": "loss_k2"}),
    "opsd, reward_k1": ("opsd", REWARD_FREE_OPSD | {"objective__kl_mode": "reward_k1"}),
    "opsd, reward_rb": ("opsd", REWARD_FREE_OPSD | {"objective__kl_mode": "reward_rb"}),
    "sdpo": ("sdpo", DISTIL),
}
TEACHERS = {"live": "LiveTeacher", "ema": "EMATeacher", "frozen": "FrozenTeacher", "trust region": "TrustRegionTeacher"}


@dataclass(frozen=True)
class ControlArm:
    """What a control arm did.

    Attributes:
        steps: optimizer steps, each with policy tokens.
        moved: the largest difference of a weight from its start; 0.0 only where all bits are equal.
        gradient_norms, kls: of each step; the KL is kl(teacher||student) in nats per token.
    """

    steps: int
    moved: float
    gradient_norms: list[float]
    kls: list[float]

    @property
    def learned_nothing(self) -> bool:
        return self.moved == 0.0 and not any(self.gradient_norms) and not any(self.kls)


def run_control_arm(method: str, teacher: str, base: Path, folder: Path, *, steps: int, fused: bool = True) -> ControlArm:
    """Run a method of :data:`METHODS` with a teacher of :data:`TEACHERS`; without ``fused`` the head runs a second pass."""
    name, changes = METHODS[method]
    settings = NONE | changes | {"max_steps": steps, "teacher": {"_component_": f"pidistill.teachers.{TEACHERS[teacher]}"}}
    start: dict[str, torch.Tensor] = {}

    def remember(recipe: Any) -> None:
        start.update({key: p.detach().clone() for key, p in recipe._model.named_parameters()})

    unfused = mock.patch.object(Objective, "per_token_loss", lambda self, step: None)
    with mock.patch.object(Objective, "per_token_loss", Objective.per_token_loss) if fused else unfused:
        recipe = run(name, small_config(name, base, folder, **settings), remember)
    rows = [row for row in metrics(folder) if "loss" in row]
    differences = [
        0.0 if torch.equal(p, start[key]) else float((p - start[key]).abs().max().clamp(min=1e-45))
        for key, p in recipe._model.named_parameters()
    ]
    return ControlArm(
        steps=sum(row["policy_tokens"] > 0 for row in rows),
        moved=max(differences),
        gradient_norms=[row["grad_norm"] for row in rows],
        kls=[row["kl_teacher_student_nats"] for row in rows],
    )
