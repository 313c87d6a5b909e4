"""Test rewards: a right answer gets 1, a wrong one 0, and nothing hangs."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from pidistill.data import gsm8k_dataset
from pidistill.envs import SingleTurn
from pidistill.errors import InputError
from pidistill.rewards import ExactMatch, GSM8KReward, final_answer
from pidistill.types import Example

REAL = os.environ.get("PIDISTILL_TEST_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="PIDISTILL_TEST_DATA names no folder with the real rows")


def example(reference):
    return Example("rows.jsonl row 4", [{"role": "user", "content": "q"}], reference=reference)


def said(text):
    return [{"role": "assistant", "content": text}]


RIGHT = [
    ("72", "so it is \\boxed{72}"),
    ("72", "first \\boxed{3}, no: \\boxed{72}."),
    ("72", "48+24 = 72\n#### 72"),
    ("72", "#### 72\n"),
    ("72", "\\boxed{ 72.00 }"),
    ("72", "\\boxed{72 \\text{ clips}}"),
    ("1234", "\\boxed{\\$1,234}"),
    ("1234", "#### $1,234"),
    ("1234", "\\boxed{1{,}234}"),
    ("1234", "\\boxed{1\\!,\\!234}"),
    ("0.5", "\\boxed{\\frac{1}{2}}"),
    ("0.5", "\\boxed{1/2}"),
    ("-5.5", "\\boxed{-5.5}"),
    ("20", "\\boxed{20\\%}"),
    (72, "\\boxed{72}"),
]
WRONG = [
    ("72", "\\boxed{73}"),
    ("72", "\\boxed{7}2"),
    ("72", "it is 72"),
    ("72", ""),
    ("72", "\\boxed{}"),
    ("72", "\\boxed{72"),
    ("72", "\\boxed{seventy}"),
    ("72", "#### 73"),
    ("72", "####"),
    ("72", "\\boxed{72}, no: \\boxed{73}"),
    ("-72", "\\boxed{72}"),
    ("720", "\\boxed{72}"),
    ("1234", "\\boxed{1.234}"),
    ("72", "\\boxed{71 or 72}"),
]


@pytest.mark.parametrize("reference, text", RIGHT)
def test_a_right_number_gets_1_however_it_is_written(reference, text):
    assert GSM8KReward()(example(reference), said(text)) == 1.0


@pytest.mark.parametrize("reference, text", WRONG)
def test_a_wrong_number_gets_0(reference, text):
    assert GSM8KReward()(example(reference), said(text)) == 0.0


def test_format_says_where_the_answer_stands():
    both = said("\\boxed{1}\n#### 2")
    scores = {f: [GSM8KReward(format=f)(example(n), both) for n in ("1", "2")] for f in ("any", "boxed", "hashes")}
    assert scores == {"any": [1.0, 0.0], "boxed": [1.0, 0.0], "hashes": [0.0, 1.0]}
    assert GSM8KReward(format="boxed")(example("2"), said("#### 2")) == 0.0
    with pytest.raises(InputError, match="reward.format=xml is unknown; choose one of any, boxed, hashes, last_number"):
        GSM8KReward(format="xml")
    assert final_answer("\\boxed{\\frac{1}{2}} km") == "\\frac{1}{2}" and final_answer("nothing") is None


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        "9**9**9**9",
        "99999999!",
        "\\sum_{n=1}{n}",
        "\\binom{99999}{999}",
        "9" * 5000,
        "(" * 5000,
        "{" * 3000 + "}" * 3000,
    ],
)
def test_expressions_whose_evaluation_would_never_end_are_not_evaluated(answer):
    start = time.perf_counter()
    assert GSM8KReward()(example("72"), said(f"\\boxed{{{answer}}}")) == 0.0
    assert GSM8KReward()(example("72"), said(f"#### {answer}")) == 0.0
    assert time.perf_counter() - start < 2.0


def test_rewards_work_outside_the_main_thread():
    scores = []

    def work():
        scores.extend(GSM8KReward()(example("41"), said(f"\\boxed{{{answer}}}")) for answer in ("41", "42", "\\frac{82}{2}"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert scores == [1.0, 0.0, 1.0]


def test_the_last_assistant_turn_counts():
    turns = [
        *said("\\boxed{1}"),
        {"role": "tool", "content": "\\boxed{3}"},
        *said("\\boxed{2}"),
        {"role": "user", "content": "x"},
    ]
    assert GSM8KReward()(example("2"), turns) == 1.0 and GSM8KReward()(example("1"), turns) == 0.0
    assert ExactMatch()(example("\\boxed{2}"), turns) == 1.0
    assert ExactMatch()(example("a"), []) == 0.0


def test_exact_match_compares_the_whole_answer_without_outer_spaces():
    assert ExactMatch()(example("Yes"), said(" Yes\n")) == 1.0
    assert [ExactMatch()(example(2.0), said(text)) for text in ("2", "2.0", "2.5")] == [1.0, 1.0, 0.0]
    assert ExactMatch()(example("Yes"), said("yes")) == 0.0
    assert ExactMatch(casefold=True)(example("Straße"), said("STRASSE")) == 1.0
    assert ExactMatch(strip=False)(example("Yes"), said(" Yes")) == 0.0
    assert ExactMatch()(example(7), said("7")) == 1.0
    assert ExactMatch()(example("Yes"), said("Yes, it is")) == 0.0


def test_a_small_number_as_reference_is_written_without_an_exponent():
    for number, text in ((5e-05, "0.00005"), (1.5e-07, "0.00000015"), (-0.25, "-0.25"), (1e22, "1" + "0" * 22)):
        assert ExactMatch()(example(number), said(text)) == 1.0
        assert GSM8KReward()(example(number), said(f"\\boxed{{{text}}}")) == 1.0
    assert GSM8KReward()(example(5e-05), said("\\boxed{0.00006}")) == 0.0
    assert ExactMatch()(example(float("inf")), said("inf")) == 1.0


def test_a_missing_or_wrong_reference_is_an_error_and_not_a_reward_of_0():
    for reward in (GSM8KReward(), ExactMatch()):
        with pytest.raises(InputError, match=r"rows\.jsonl row 4 has no reference to compare with"):
            reward(example(None), said("1"))
    with pytest.raises(InputError, match=r"row 4: the reference 'a poem\^' is not a number"):
        GSM8KReward()(example("a poem^"), said("1"))


def test_single_turn_ends_with_its_reward():
    environment = SingleTurn(GSM8KReward())
    state = environment.reset(example("72"))
    for text, reward in (("\\boxed{72}", 1.0), ("\\boxed{7}", 0.0)):
        step = environment.step(state, said(text)[0], truncated=False)
        assert (step.reward, step.done, step.observations) == (reward, True, [])
    assert SingleTurn(lambda example, turns: len(turns) / 4).step(state, said("x")[0], truncated=True).reward == 0.25


HAND_MADE = [("It is <<1+1=2>>2.\n#### 2", "2"), ("1,000 + 234.\n#### 1,234", "1234"), ("Cold.\n#### -5", "-5")]


@pytest.mark.parametrize("answer_format", ["boxed", "hashes"])
def test_the_worked_solution_is_right_and_another_number_is_not(tmp_path, answer_format):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps({"question": "q", "answer": answer}) + "\n" for answer, _ in HAND_MADE))
    dataset = gsm8k_dataset(str(file), answer_format=answer_format)
    assert [e.reference for e in dataset] == [number for _, number in HAND_MADE]
    check_all(dataset, answer_format)


@needs_data
@pytest.mark.parametrize("answer_format, name", [("boxed", "gsm8k_train.jsonl"), ("hashes", "gsm8k_test_400.jsonl")])
def test_every_real_worked_solution_is_right_and_another_number_is_not(answer_format, name):
    check_all(gsm8k_dataset(str(Path(REAL) / name), answer_format=answer_format), answer_format)


def check_all(dataset, answer_format):
    assert len(dataset) > 0
    for row in dataset:
        assert GSM8KReward(format=answer_format)(row, row.completion) == 1.0, row.id
        final = f"\\boxed{{{row.reference}}}" if answer_format == "boxed" else f"#### {row.reference}"
        wrong = row.completion[0]["content"].replace(final, final.replace(row.reference, f"{float(row.reference) + 1:.10g}"))
        assert wrong != row.completion[0]["content"]
        assert GSM8KReward(format=answer_format)(row, said(wrong)) == 0.0, row.id


@pytest.mark.parametrize(
    "answer",
    [
        "72 million",
        "72k",
        "72 dozen",
        "72 + x",
        "72 x 3",
        "not 72",
        "-72",
        "72 hours and 5 minutes",
        "72 half-dozens",
        "1E999999",
    ],
)
def test_words_and_signs_that_change_the_value_are_no_unit(answer):
    example = Example(id="row", messages=[], reference="72")
    assert GSM8KReward()(example, [{"role": "assistant", "content": f"#### {answer}"}]) == 0.0
    assert GSM8KReward()(example, [{"role": "assistant", "content": "#### **72** cups of tea"}]) == 1.0
