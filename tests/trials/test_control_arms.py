"""Train every method without reward for 40 steps in its control arm `none`: every teacher, one and two passes of the head."""

import pytest

from tests.recipes.conftest import fast_setup, leave_the_process_as_it_was, tiny_base  # noqa: F401
from tests.support.control_arms import METHODS, TEACHERS, run_control_arm

STEPS = 40

pytestmark = pytest.mark.trials


def test_control_arms_leave_the_weights_bit_equal(tiny_base, tmp_path):  # noqa: F811
    arms = [(method, teacher, True) for method in METHODS for teacher in TEACHERS]
    arms += [(method, teacher, False) for method in METHODS for teacher in ("live", "ema")]
    drifted = {}
    for number, (method, teacher, fused) in enumerate(arms):
        arm = run_control_arm(method, teacher, tiny_base, tmp_path / str(number), steps=STEPS, fused=fused)
        assert arm.steps == STEPS
        name = f"{method}, {teacher} teacher, {'one pass' if fused else 'two passes'}"
        print(f"{name}: largest change of a weight {arm.moved}, largest gradient norm {max(arm.gradient_norms)}")
        if not arm.learned_nothing:
            drifted[name] = arm.moved
    print(f"control arms of {STEPS} steps: {len(arms)} tried, {len(drifted)} drifted from the start")
    assert not drifted, f"largest change of a weight: {drifted}"
