"""Test that references which the reward cannot judge are refused by row before any weights are loaded."""

import json
from datetime import date, datetime, time

import pytest
from omegaconf import OmegaConf

from pidistill.data import load_prompts
from pidistill.data.load import check_references
from pidistill.errors import InputError
from pidistill.rewards import Contains, ExactMatch, GSM8KReward
from pidistill.testing import TINY_SIZES
from pidistill.types import Example
from tests.support.tiny_tokenizers import qwen_folder

REWARD = {"_component_": "pidistill.rewards.GSM8KReward"}
SINGLE = {"_component_": "pidistill.envs.SingleTurn", "reward": REWARD}
NOT_NUMBERS = ["", "10^3", "None", "nan", True, "see the book", "x+1", "(1, 2)"]
NUMBERS = ["72", "-3", "1,000", "0.5", 72, 7.5, "$18"]


def example(reference) -> Example:
    return Example(id="train.jsonl row 4", messages=[{"role": "user", "content": "q"}], reference=reference)


@pytest.mark.parametrize("reference", NOT_NUMBERS, ids=map(repr, NOT_NUMBERS))
def test_a_reference_that_is_no_number_is_refused_with_its_row(reference):
    with pytest.raises(InputError, match=r"train\.jsonl row 4: the reference .* is not a number; use another reward"):
        GSM8KReward().check_reference(example(reference))
    with pytest.raises(InputError, match="is not a number"):
        check_references(OmegaConf.create({"environment": SINGLE}).environment, [example("72"), example(reference)])


@pytest.mark.parametrize("reference", NUMBERS, ids=map(repr, NUMBERS))
def test_a_reference_that_is_a_number_is_accepted(reference):
    check_references(SINGLE, [example(reference)])


@pytest.mark.parametrize("reward", [GSM8KReward(), Contains(), ExactMatch()], ids=lambda reward: type(reward).__name__)
@pytest.mark.parametrize("reference", [["4", "four"], {"a": 1}], ids=repr)
def test_a_reference_of_several_parts_is_refused_where_one_text_is_compared(reward, reference):
    sentence = r"train\.jsonl row 4: the reference is .*, and this reward compares with one text or number"
    with pytest.raises(InputError, match=sentence):
        reward.check_reference(example(reference))


@pytest.mark.parametrize("reward", [Contains(), ExactMatch()], ids=lambda reward: type(reward).__name__)
@pytest.mark.parametrize("reference", [None, float("nan")], ids=repr)
def test_an_empty_cell_is_no_reference(reward, reference):
    with pytest.raises(InputError, match=r"train\.jsonl row 4 has no reference to compare with; fill the column that dataset"):
        reward.check_reference(example(reference))


@pytest.mark.parametrize("reward", [GSM8KReward(), Contains(), ExactMatch()], ids=lambda reward: type(reward).__name__)
@pytest.mark.parametrize("reference", [datetime(1999, 5, 4), time(12, 30)], ids=repr)
def test_a_reference_that_is_a_time_is_refused_because_its_text_is_not_known(reward, reference):
    with pytest.raises(InputError, match=rf"row 4: the reference is the time {reference.isoformat()}, .* as it is"):
        reward.check_reference(example(reference))


@pytest.mark.parametrize("reward", [Contains(), ExactMatch()], ids=lambda reward: type(reward).__name__)
def test_a_reference_that_is_a_date_is_compared_as_year_month_and_day(reward):
    reward.check_reference(example(date(1999, 5, 4)))
    for said, right in (("1999-05-04", 1.0), ("1999-05-05", 0.0)):
        assert reward(example(date(1999, 5, 4)), [{"role": "assistant", "content": said}]) == right


def test_an_empty_reference_that_every_answer_would_contain_is_refused():
    contains = {"_component_": "pidistill.rewards.Contains"}
    check_references({"reward": contains}, [example("Oslo")])
    with pytest.raises(InputError, match=r"train\.jsonl row 4: the reference is empty"):
        check_references({"reward": contains}, [example("  ")])


def test_a_blank_reference_that_an_empty_answer_would_equal_is_refused():
    for reference in ("", " \n"):
        with pytest.raises(
            InputError, match=r"train\.jsonl row 4: the reference is empty, and an empty answer equals it; check"
        ):
            ExactMatch(strip=False).check_reference(example(reference))


@pytest.mark.parametrize("node", [
    {"reward": "pidistill.rewards.Contains"},
    {"reward": {"_component_": "pidistill.rewards.Constraints", "checks": {"a": "pidistill.rewards.Contains"}}},
])  # fmt: skip
def test_a_reward_that_is_named_by_its_dotted_path_alone_is_asked_too(node):
    with pytest.raises(InputError, match=r"train\.jsonl row 4 has no reference to compare with"):
        check_references(node, [example(None)])


def test_rewards_are_found_at_any_depth_and_the_environment_is_not_built():
    checks = {"_component_": "pidistill.rewards.Constraints", "checks": {"right": REWARD}}
    outer = {"_component_": "tests.data.test_references.no_environment", "inner": [{"reward": checks}]}
    with pytest.raises(InputError, match="is not a number"):
        check_references(outer, [example("see the book")])
    check_references(None, [example("see the book")])


def no_environment(inner):
    raise AssertionError("the environment was built")


@pytest.mark.parametrize(("samples", "judged"), [(True, True), (True, False), (False, True)])
def test_a_run_refuses_the_rows_that_it_samples_and_judges_and_no_others(tmp_path, samples, judged):
    folder = qwen_folder(tmp_path / "model")
    rows = [{"question": "q", "answer": "4"}, {"question": "q", "answer": "see the book"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = OmegaConf.create({
        "model": {"_component_": "torchtune.models.llama3.llama3", **TINY_SIZES, "vocab_size": 700},
        "tokenizer": {"_component_": "pidistill.tokenizers.HFChatTokenizer", "path": str(folder)},
        "checkpointer": {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(folder)},
        "environment": SINGLE,
        "dataset": {
            "_component_": "pidistill.data.qa_dataset", "source": str(tmp_path / "rows.jsonl"), "privileged_key": None,
        },
    })  # fmt: skip
    if samples and judged:
        with pytest.raises(InputError, match=r"rows\.jsonl row 1: the reference 'see the book' is not a number"):
            load_prompts(cfg, no_pi="rl")
    else:
        assert len(load_prompts(cfg, no_pi="rl", samples=samples, judged=judged).prompts) == 2
