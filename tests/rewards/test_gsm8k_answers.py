"""Test answers of GSM8K: how a number may be written, where it may stand, and how long judging takes."""

import time

import pytest

from pidistill.envs import SingleTurn
from pidistill.rewards import GSM8KReward
from pidistill.rewards.gsm8k import MAX_ANSWER_CHARS, final_answer, read_number
from pidistill.types import Example


def judge(text, reference="72", format="any"):
    row = Example(id="row 0", messages=[{"role": "user", "content": "q"}], reference=reference)
    return GSM8KReward(format)(row, [{"role": "assistant", "content": text}])


RIGHT = ["#### 72 eggs", "#### 72 dollars", "#### **72**", "**#### 72**", "#### `72`", "#### 72 (dollars)", "#### 72°"]
RIGHT += ["\\boxed{72 cups}", "\\boxed{72^\\circ}", "\\boxed{72\\text{ cm}^2}", "#### 72 km/h", "#### $72.00", "#### 144/2"]
RIGHT += ["\\boxed{\\textbf{72}}", "\\boxed{{72}}", "\\boxed{(72)}", "\\boxed{x = 72}", "#### 72 m²", "\\boxed{\\approx 72}"]
RIGHT += ["#### 72.", "\\boxed{\\$72}"]
RIGHT += [
    "#### 72 times",
    "\\boxed{72 percent}",
    "\\boxed{72\\text{ percent}}",
    "\\boxed{72 quarters}",
    "#### 72 times as many",
]
RIGHT += ["\\boxed{72 cats and dogs}", "\\boxed{72^\\circ C}", "#### 72°F", "\\boxed{72^{\\circ}\\text{F}}", "\\boxed{72/hour}"]
RIGHT += [
    "#### 72 sq. ft",
    "#### ¥72",
    "#### *72*",
    "#### ***72*** eggs",
    "\\boxed{\\frac{-144}{-2}}",
    "#### 72 L",
    "#### 72 m",
]
RIGHT += ["#### 72 fifth graders", "#### 72 two-point shots", "\\boxed{72 \\text{ m}^2}", "#### 72 km^2"]


@pytest.mark.parametrize("text", RIGHT)
def test_a_unit_or_markup_beside_the_number_does_not_make_it_wrong(text):
    assert judge(text) == 1.0
    assert judge(text, "71") == 0.0


NOT_ONE_NUMBER = [
    "#### 72 or 73",
    "#### 72^2",
    "#### 72 = x!",
    "\\boxed{70+2}",
    "\\boxed{72 \\times 1}",
    "#### 71,72",
    "#### 1/0",
]
NOT_ONE_NUMBER += [
    "\\boxed{\\$72 \\text{ million}}",
    "#### 72 thousand",
    "#### 72 fifths",
    "#### 72 eighths",
    "#### 72 trillion",
]
NOT_ONE_NUMBER += ["#### 72 bn", "#### 72M", "#### 72 quarters of it", "#### 72 and counting", "#### 72 feet and two inches"]
NOT_ONE_NUMBER += ["#### 6*12", "#### 7**2", "#### 6 * 12", "#### 7*2*", "#### 72 fifth", "\\boxed{72\\frac{-1}{2}}"]


@pytest.mark.parametrize("text", NOT_ONE_NUMBER)
def test_several_numbers_a_calculation_or_a_scaled_number_do_not_count(text):
    assert judge(text) == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [("5 1/2 hours", 5.5), ("3\\frac{1}{2}", 3.5), ("-\\frac{3}{4}", -0.75), ("\\frac12", 0.5), ("72/10", 7.2), (".5", 0.5),
     ("\\frac{-1}{2}", -0.5), ("-\\frac{−1}{2}", 0.5), ("−5", -5), ("-$1,234.50", -1234.5), ("0.333333", 1 / 3),
     ("- 3", -3)],
)  # fmt: skip
def test_fractions_and_signs_have_their_value(text, value):
    assert float(read_number(text)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1 000", 1000), ("1\\ 000", 1000), ("1\\,000", 1000), ("1\u2009000", 1000), ("-12 345 678.5", -12345678.5),
     ("$1 000.", 1000), ("12 18", None), ("12 1800", None), ("0 000", None), ("2 500 ml", None), ("1 000 000 1", None),
     ("1.2\\times 10^3", 1200), ("1.2 \\times 10^{3}", 1200), ("-1.2×10^{-1} m", -0.12), ("5 \\cdot 10^3", 5000),
     ("1.2e3", 1200), ("1.2E+3", 1200), ("-5e-05", -0.00005), ("1e3 eggs", 1000), ("1e100", None), ("1e", None),
     ("2 \\times 10", None), ("1.2\\times 10^32", None), ("1.2\\times 10^{300}", None), ("1.2\\times 10^3 + 1", None)],
)  # fmt: skip
def test_thousands_with_spaces_and_powers_of_ten_are_read(text, value):
    number = read_number(text)
    assert number is None if value is None else number == pytest.approx(value, abs=1e-12)


# ---------------------------------------------------------------------------------------------- where it stands


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed {72}",
        "\\boxed{72} ... Wait, \\boxed{}",
        "\\boxed{72}\n\\boxed{ }\n\\boxed{",
        "\\boxed{72}, as \\boxed asks",
        "\\boxed{}\n#### 72",
        "#### 72\n####",
        "#### 72\n\n#### Explanation\nShe has 3 boxes.",
        "#### 72\n####\nI needed three steps.",
        "#### Step 1\n####\n72",
        "####\n72",
        "#### 71\n#### 72",
        "#### 72\n#### 3. Check it\nRight.",
    ],
)
def test_an_empty_box_or_a_heading_does_not_hide_the_answer(text):
    assert judge(text) == 1.0


@pytest.mark.parametrize(
    "text", ["\\boxed{72} \\boxed {71}", "\\boxed{72} \\boxed{x}", "#### 72\n#### 71", "#### 72\n#### 71 or 72"]
)
def test_the_last_answer_that_is_not_empty_counts(text):
    assert judge(text) == 0.0


# ---------------------------------------------------------------------------------------------- the last number


@pytest.mark.parametrize(
    ("text", "number"),
    [("The number of apples that are left - 72", "72"), ("Answer:\n- $72 per day", "$72"), ("**Total** - 72 eggs", "72"),
     ("so\n - 1/2", "1/2"), ("80 - 8", "8"), ("x = - 72", "- 72"), ("x =- $72", "- $72"), ("x = −\\frac12", "−\\frac12"),
     ("x = - \\frac12", "- \\frac12"), ("Answer:\n-72", "-72"), ("\\boxed{- 72}", "- 72"), ("#### - 72", "- 72"),
     ("\\(- 72\\)", "- 72"), ("x: - 72", "- 72"), ("Answers =\n- 72", "72")],
)  # fmt: skip
def test_a_dash_and_a_space_before_the_last_number_are_a_minus_only_behind_a_sign(text, number):
    assert final_answer(text, "last_number") == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("She has 70 + 2 = 72 eggs.", "72"), ("so 72", "72"), ("It costs $1,234.50!", "$1,234.50"), ("5-3", "3"), ("is -5", "-5"),
     ("The answer is 1/2.", "1/2"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("It is 5 1/2 h", "5 1/2"),
     ("on 5/6/2024", "2024"), ("$-\\frac12$", "-\\frac12"), ("\\frac{-1}{2}", "\\frac{-1}{2}"), ("7.5/2", "2"),
     ("It is 5 \\text{ m}^2.", "5"), ("25 km^2", "25"), ("25 cm^{2}", "25"), ("2^3", "3"), ("x^2", None), ("is ¥72", "¥72"),
     ("\\boxed{1{,}234}", "1,234"), ("none", None), ("", None), ("x" * 5000 + "7", "7"), ("7" * 5000, None)],
)  # fmt: skip
def test_the_last_number_of_a_text_is_found_wherever_it_stands(text, number):
    assert final_answer(text, "last_number") == number


def test_a_right_answer_that_is_written_in_another_way_succeeds_with_last_number_alone():
    wrongly_written, wrong = "She has 72 eggs.", "She has 73 eggs.\n#### 73"
    assert (judge(wrongly_written), judge(wrongly_written, format="last_number")) == (0.0, 1.0)
    assert (judge(wrong), judge(wrong, format="last_number")) == (0.0, 0.0)


@pytest.mark.parametrize("format", ["any", "hashes", "last_number"])
def test_both_successes_are_parts_of_the_reward_whatever_the_format_is(format):
    row = Example(id="row 0", messages=[{"role": "user", "content": "q"}], reference="72")
    environment = SingleTurn(GSM8KReward(format))
    step = environment.step(environment.reset(row), {"role": "assistant", "content": "She has 72 eggs."}, truncated=False)
    assert step.reward_parts == {"success_strict": 0.0, "success_last_number": 1.0}
    assert step.reward == float(format == "last_number")
    right = environment.step(environment.reset(row), {"role": "assistant", "content": "#### 72"}, truncated=False)
    assert right.reward_parts == {"success_strict": 1.0, "success_last_number": 1.0} and right.reward == 1.0


# ---------------------------------------------------------------------------------------------- bounds

SLOW = {
    "nested braces": "{" * 20 + "72" + "}" * 20,
    "exponent": "1E+999999",
    "exponent after a point": "1.E999999",
    "power of powers": "9^{9^{9^9}}",
    "nested fractions": "\\frac{" * 40 + "1" + "}{2}" * 40,
    "many units": "72" + " ab" * 80,
    "many digits": "9" * MAX_ANSWER_CHARS,
    "commas": "1" + ",111" * 60 + "x",
    "spaces": "7" + " " * 250 + "x",
    "texts": "\\text{" * 40,
    "megabytes": "7" * 3_000_000,
    "megabytes of braces": "{" * 3_000_000,
    "megabytes of lines": "a\n" * 1_500_000,
    "megabytes of empty boxes": "\\boxed{}" * 400_000,
    "megabytes of open boxes": "\\boxed{ " * 400_000,
    "megabytes of hashes": "#" * 3_000_000,
    "megabytes of headings": "#### a\n" * 400_000,
    "thousands": "1" + " 000" * 60 + "x",
    "powers": "1\\times 10^3" * 20,
}


@pytest.mark.parametrize("name", SLOW)
def test_a_hostile_answer_is_judged_within_milliseconds(name):
    texts = [SLOW[name], f"\\boxed{{{SLOW[name]}}}", f"#### {SLOW[name]}"]
    judge("#### 72")  # what the first call alone costs
    for text in texts:
        start = time.thread_time()
        judge(text)
        assert time.thread_time() - start < 0.05, text[:20]


def test_no_answer_of_more_characters_than_the_bound_is_read():
    assert read_number("7" + "0" * 60) is not None
    assert read_number("72" + " " * MAX_ANSWER_CHARS) is None
    assert final_answer("#### 72 " + "x" * MAX_ANSWER_CHARS) is None and final_answer("\\boxed{" + "7" * 300 + "}") is None
