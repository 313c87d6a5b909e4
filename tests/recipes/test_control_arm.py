"""The control arm `none` of reward-free methods: the teacher sees what the student sees, so nothing is learned."""

import pytest
import torch

from pidistill.objectives.base import Objective
from pidistill.teachers import EMATeacher
from tests.support.runs import metrics, quick_setup, run, small_config

NONE = {"privileged__control": "none", "objective__no_pi": "distill", "max_steps": 4, "lr_scheduler": None}


@pytest.mark.parametrize(
    ("name", "one_pass", "changes"),
    [
        ("pcsd", True, {}),
        ("pcsd", False, {"packing": "padded"}),
        ("sdft", True, {}),
        ("sdft", False, {}),
        ("opsd_ucla", True, {"objective__divergence": "kl_teacher_student", "objective__entry_clip": 0.05}),
        ("gkd", True, {"group_size": 1, "objective__lmbda": 1.0}),
    ],
)
def test_a_teacher_without_privileged_information_leaves_the_weights_bit_equal(
    name, one_pass, changes, tiny_base, tmp_path, monkeypatch
):
    if not one_pass:
        monkeypatch.setattr(Objective, "per_token_loss", lambda self, step: None)
    starts = []
    with quick_setup():
        recipe = run(
            name,
            small_config(name, tiny_base, tmp_path, **NONE | changes),
            lambda recipe: starts.append({key: p.detach().clone() for key, p in recipe._model.named_parameters()}),
        )
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    assert len(rows) == 4 and all(row["policy_tokens"] > 0 for row in rows)
    assert [(row["grad_norm"], row["kl_teacher_student_nats"]) for row in rows] == [(0.0, 0.0)] * 4
    assert all(torch.equal(p, starts[0][key]) for key, p in recipe._model.named_parameters())
    if name == "sdft":
        assert isinstance(recipe._teacher, EMATeacher)


def test_a_run_with_a_divergence_of_ones_own_learns_and_logs_it(tiny_base, tmp_path):
    path = "tests.support.own_divergences.renyi"
    with quick_setup():
        run("opsd_ucla", small_config("opsd_ucla", tiny_base, tmp_path, max_steps=1, objective__divergence=path))
    (row,) = [row for row in metrics(tmp_path) if "loss" in row]
    assert row["renyi_nats"] > 0 and row["grad_norm"] > 0
    assert row["loss"] == pytest.approx(row["renyi_nats"], rel=1e-4)
