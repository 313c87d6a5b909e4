"""Test that each alarm is given once for its run, with numbers, cause and key; a healthy run gets none."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from pidistill.distributed.run import Run
from pidistill.training import health
from pidistill.training.health import RULES, STEPS, ZERO_GRADIENT_STEPS, Health
from pidistill.training.metrics_log import MetricsLog
from tests.support.builders import CPU

GRPO = {"objective": {"_component_": "pidistill.objectives.GRPO"}, "group_size": 4}
SDFT = {"objective": {"_component_": "pidistill.objectives.SDFT"}, "group_size": 1}
HEALTHY = {
    "loss": 0.1,
    "grad_norm": 0.5,
    "entropy_nats": 1.0,
    "teacher_entropy_nats": 0.8,
    "kl_teacher_student_nats": 0.5,
    "kl_student_teacher_nats": 0.6,
    "reward_mean": 0.4,
    "success_frac": 0.4,
    "truncated_frac": 0.1,
    "zero_advantage_frac": 0.5,
}


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(health, "log", type("Log", (), {"warning": staticmethod(said.append)}))
    return said


def alarms_of(rows, cfg=GRPO):
    looked = Health(cfg)
    given = {}
    for step, row in enumerate(rows, 1):
        new = looked.look({"step": step, "round": step - 1} | HEALTHY | row)
        assert not new.keys() & given.keys(), "an alarm is given once"
        given |= new
    return given


def test_a_healthy_run_gets_no_alarm(warnings):
    assert alarms_of([{}] * 20) == {}
    assert warnings == []


@pytest.mark.parametrize(
    ("name", "rows", "numbers"),
    [
        (
            "entropy_lost",
            [{}, {"entropy_nats": 5e-4}, {"entropy_nats": 1e-4}],
            "step 2: entropy is 5.0e-04 nats .*optimizer.lr",
        ),
        ("kl_lost", [{}, {"kl_teacher_student_nats": 0.009}], r"fell from 0.5 to 0.009 .*\(0.4 to 0.4\).*objective.beta"),
        (
            "entropy_rises_success_falls",
            [{"entropy_nats": 0.56, "success_frac": 0.66}] * 3 + [{"entropy_nats": 3.0, "success_frac": 0.0}] * 3,
            "step 6: entropy rose from 0.56 to 3 nats while success_frac fell from 0.66 to 0 .*lower optimizer.lr",
        ),
        ("gradient_zero", [{"grad_norm": 0.0}] * 9, f"step {ZERO_GRADIENT_STEPS}: the gradient was 0 for .*raise group_size"),
        (
            "teacher_is_student",
            [{"kl_teacher_student_nats": 0.0, "rows_without_pi": 7}] * 9,
            f"step {STEPS}: .* in the first 3 steps.*rows_without_pi 7.*privileged.control=none",
        ),
        (
            "teacher_corrupt",
            [{"kl_student_teacher_nats": 9.0}] * 3,
            "step 1: .*KL from the student 9 and .*nats per token.*teacher_checkpointer",
        ),
        (
            "teacher_corrupt",
            [{"teacher_nll_nats": 4.4, "student_nll_nats": 0.6}],
            r"step 1: .*of the samples 4.4 nats per token \(the student's: 0.6\).*teacher_model",
        ),
        (
            "bad_rollout",
            [{"sampler_mismatch_rollout_max_nats": 5.0, "sampler_mismatch_mean_nats": 0.04}],
            r"one rollout are 5 nats per token away .* is 0.04; .*e\^5 times.*objective.dual_clip",
        ),
        ("truncated", [{"truncated_frac": 1.0}] * 3, "step 1: 100% of the rollouts were cut off .*sampler.max_new_tokens"),
        ("no_spread", [{"zero_advantage_frac": 1.0}] * 9, "step 3: .*every group's rollouts have the same reward"),
    ],
)
def test_each_fault_gives_its_own_alarm_once_with_numbers_and_key(name, rows, numbers, warnings):
    import re

    given = alarms_of(rows)
    assert list(given) == [name]
    assert re.search(numbers, given[name]), given[name]
    assert warnings == [f"alarm {name}: {given[name]}"]


@pytest.mark.parametrize(
    ("rows", "cfg"),
    [
        ([{}, {"kl_teacher_student_nats": 0.009, "reward_mean": 0.6}], GRPO),  # the KL is gone because it was learned
        ([{"entropy_nats": 0.5}] * 3 + [{"entropy_nats": 3.0}] * 3, GRPO),  # entropy rises, success stays
        ([{"success_frac": 0.6}] * 3 + [{"success_frac": 0.0}] * 3, GRPO),  # success falls, entropy stays
        ([{"grad_norm": 0.0}] * 4 + [{}] + [{"grad_norm": 0.0}] * 4, GRPO),  # not in a row
        ([{"kl_teacher_student_nats": 0.0}] * 9, GRPO | {"privileged": {"control": "none"}}),  # meant
        (
            [{"kl_teacher_student_nats": 0.0, "grad_norm": 0.0}] * 9,
            SDFT | {"privileged": {"control": "none"}},
        ),  # the control arm of a method without reward
        ([{"zero_advantage_frac": 1.0}] * 9, SDFT),  # the method reads no reward
        ([{}] * 5 + [{"kl_student_teacher_nats": 9.0}], GRPO),  # the student moved away
        ([{"teacher_nll_nats": 2.0, "student_nll_nats": 0.6}], GRPO),  # privileged information makes samples unlikely
        ([{"sampler_mismatch_rollout_max_nats": 0.2}], GRPO),  # bf16
    ],
)
def test_what_resembles_a_fault_gives_no_alarm(rows, cfg):
    assert alarms_of(rows, cfg) == {}


TOP_K = GRPO | {"sampler": {"top_k": 20}}


@pytest.mark.parametrize(
    ("cfg", "row", "names"),
    [
        (TOP_K, {"sampler_mismatch_mean_nats": 0.4, "clip_frac": 0.2}, ["fresh_samples_clipped"]),
        (TOP_K, {"clip_frac": 0.2}, []),  # a later update of the round, which moved away
        (TOP_K, {"sampler_mismatch_mean_nats": 0.4, "clip_frac": 0.2, "student_ratio_mean": 0.5}, []),  # another view's ratio
        (TOP_K | {"importance_weights": {"cap": 2.0}}, {"sampler_mismatch_mean_nats": 0.4, "clip_frac": 0.2}, []),
        (GRPO, {"sampler_mismatch_mean_nats": 0.4, "clip_frac": 0.2}, []),
    ],
)
def test_fresh_samples_that_top_k_makes_the_clip_cut_give_an_alarm(cfg, row, names):
    assert list(alarms_of([row], cfg)) == names


def test_several_updates_of_one_round_count_as_one_round_without_spread():
    looked = Health(GRPO)
    given = [looked.look(HEALTHY | {"step": step, "round": 0, "zero_advantage_frac": 1.0}) for step in range(1, 9)]
    assert not any(given)


def test_a_uniform_teacher_is_told_by_the_size_of_the_vocabulary():
    uniform = [{"teacher_entropy_nats": 4.44, "kl_student_teacher_nats": 3.0}]
    assert list(alarms_of(uniform, GRPO | {"model": {"vocab_size": 85}})) == ["teacher_corrupt"]
    assert alarms_of(uniform, GRPO | {"model": {"vocab_size": 150_000}}) == {}


def test_a_teacher_whose_information_says_much_is_not_corrupt_where_it_sampled():
    """The numbers of step 1 of π-Distill of a long system prompt; without the vocabulary's size the sentence leaves it out."""
    far = {"kl_student_teacher_nats": 7.1, "kl_teacher_student_nats": 4.4, "teacher_entropy_nats": 0.35}
    assert alarms_of([far | {"teacher_nll_nats": 0.36, "student_nll_nats": 4.6}], GRPO) == {}
    (sentence,) = alarms_of([far | {"teacher_nll_nats": 5.0, "student_nll_nats": 4.6}], GRPO).values()
    assert "its entropy is 0.35 nats, its KL from the student 7.1" in sentence


def log_in(folder: Path, first_step: int = 0) -> MetricsLog:
    run = Run(CPU, torch.float32, 0, 1, 0, folder)
    return MetricsLog(OmegaConf.create(GRPO), run, first_step=first_step, last_step=9, title="test")


def test_an_alarm_stands_in_its_row_and_is_not_repeated_after_a_resume(tmp_path, warnings):
    log = log_in(tmp_path)
    log.write({"step": 1} | HEALTHY)
    log.write({"step": 2} | HEALTHY | {"entropy_nats": 1e-4})
    resumed = log_in(tmp_path, first_step=2)
    resumed.write({"step": 3} | HEALTHY | {"entropy_nats": 1e-4, "kl_teacher_student_nats": 0.009})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(row.get("alarms", {})) for row in rows] == [[], ["entropy_lost"], ["kl_lost"]]
    assert "from 0.5 to 0.009" in rows[2]["alarms"]["kl_lost"]  # measured from the start, which is before the resume
    assert len(warnings) == 2


def test_every_alarm_stands_in_the_table_of_what_goes_wrong():
    page = (Path(__file__).parents[2] / "docs" / "what-goes-wrong.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert [name for name in RULES if not any(f"`{name}`" in line for line in table)] == []
