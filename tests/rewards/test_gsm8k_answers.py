import time

import pytest

from pidistill.rewards import GSM8KReward
from pidistill.types import Example


def reward(text, reference="72"):
    row = Example(id="row 0", messages=[{"role": "user", "content": "q"}], reference=reference)
    return GSM8KReward()(row, [{"role": "assistant", "content": text}])


RIGHT = ["#### 72 eggs", "#### 72 dollars", "#### **72**", "**#### 72**", "#### `72`", "#### 72 (dollars)"]
RIGHT += ["\\boxed{72 cups}", "\\boxed{72^\\circ}", "\\boxed{72\\text{ cm}^2}"]


@pytest.mark.parametrize("text", RIGHT)
def test_a_unit_or_markdown_beside_the_number_does_not_make_it_wrong(text):
    assert reward(text) == 1.0
    assert reward(text, "71") == 0.0


@pytest.mark.parametrize("text", ["#### 72 or 73", "#### 72^2", "#### 72 = x!"])
def test_several_numbers_or_a_calculation_do_not_count_as_one_number(text):
    assert reward(text) == 0.0


@pytest.mark.parametrize("inside", ["{" * 20 + "72" + "}" * 20, "1E+999999", "1.E999999"])
def test_an_answer_that_would_take_long_to_parse_is_judged_at_once(inside):
    start = time.process_time()
    reward(f"\\boxed{{{inside}}}")
    assert time.process_time() - start < 1
