"""Test the control arm `none` of methods without reward: four steps here, forty and every method in tests/trials."""

import pytest

from tests.support.control_arms import run_control_arm
from tests.support.runs import metrics, quick_setup, run, small_config


@pytest.mark.parametrize(
    ("method", "teacher", "fused"),
    [
        ("pcsd", "live", True),
        ("pcsd, padded rows", "live", False),
        ("sdft", "ema", True),
        ("sdft", "ema", False),
        ("sdft, mixed precision", "frozen", True),
        ("opsd_ucla, clipped entries", "frozen", True),
        ("opsd_ucla, own divergence", "ema", True),
        ("gkd, half off-policy", "trust region", True),
        ("opd, sampled", "frozen", True),
        ("opsd, loss_rb_complete", "live", True),
    ],
)
def test_a_teacher_without_privileged_information_leaves_the_weights_bit_equal(method, teacher, fused, tiny_base, tmp_path):
    arm = run_control_arm(method, teacher, tiny_base, tmp_path, steps=4, fused=fused)
    assert arm.steps == 4
    assert arm.learned_nothing, arm


def test_a_run_with_a_divergence_of_ones_own_learns_and_logs_it(tiny_base, tmp_path):
    path = "tests.support.own_divergences.renyi"
    with quick_setup():
        run("opsd_ucla", small_config("opsd_ucla", tiny_base, tmp_path, max_steps=1, objective__divergence=path))
    (row,) = [row for row in metrics(tmp_path) if "loss" in row]
    assert row["renyi_nats"] > 0 and row["grad_norm"] > 0
    assert row["loss"] == pytest.approx(row["renyi_nats"], rel=1e-4)
