"""Every method without reward, 40 steps in its control arm `none`: with every teacher, and with two passes of the head."""

import pytest

from tests.recipes.conftest import fast_setup, leave_the_process_as_it_was, tiny_base  # noqa: F401
from tests.support.control_arms import METHODS, TEACHERS, run_control_arm

STEPS = 40

pytestmark = pytest.mark.trials


def test_control_arms_leave_the_weights_bit_equal(tiny_base, tmp_path):  # noqa: F811
    drifted, tried = {}, 0
    for method in METHODS:
        for teacher in TEACHERS:
            for fused in (True, False):
                arm = run_control_arm(method, teacher, tiny_base, tmp_path / str(tried), steps=STEPS, fused=fused)
                tried += 1
                assert arm.steps == STEPS
                if not arm.learned_nothing:
                    drifted[method, teacher, "one pass" if fused else "two passes"] = (arm.moved, max(arm.gradient_norms))
    print(
        f"\ncontrol arms of {STEPS} steps: {tried} tried, {tried - len(drifted)} bit-equal to the start, {len(drifted)} drifted"
    )
    assert not drifted, f"(largest change of a weight, largest gradient norm): {drifted}"
