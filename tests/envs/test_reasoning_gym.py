"""Test tasks of Reasoning Gym through our protocol: its entries, its verifiers; then both recipes."""

import inspect
import re
import sys

import pytest

from pidistill.envs import ReasoningGymEnvironment, reasoning_gym_dataset
from pidistill.envs.reasoning_gym import EVALUATED
from pidistill.errors import InputError
from pidistill.training.start import cleanup
from tests.support.byte_base import RECIPES, assert_trained, settings, train_base
from tests.support.tiny_qwen import load_config, run_config, set_up

reasoning_gym = pytest.importorskip(
    "reasoning_gym", reason="the extra `reasoning-gym` is not installed; `make test-envs` runs these"
)

ENVIRONMENT = ReasoningGymEnvironment()


def judged(row, text):
    step = ENVIRONMENT.step(ENVIRONMENT.reset(row), {"role": "assistant", "content": text}, truncated=False)
    assert step.done and step.observations == []
    return step.reward


def entry_of(row):
    return row.data["reasoning_gym"]["entry"]


# ------------------------------------------------------------------------------------------- rows


def test_rows_are_entries_and_depend_on_their_arguments_alone():
    rows = list(reasoning_gym_dataset("leg_counting", 6, seed=3))
    for row in rows:
        entry = entry_of(row)
        assert row.messages == [
            {"role": "user", "content": f"{entry['question']}\n\nGive the final answer within <answer></answer> tags."}
        ]
        assert row.privileged == f"The answer is {entry['answer']}." and row.reference == entry["answer"]
        assert row.completion == [{"role": "assistant", "content": f"<answer>{entry['answer']}</answer>"}]
    assert [entry_of(row) for row in reasoning_gym_dataset("leg_counting", 9, seed=3)][:6] == [entry_of(row) for row in rows]
    questions = [{row.messages[0]["content"] for row in reasoning_gym_dataset("leg_counting", 30, seed=s)} for s in range(3)]
    assert len(set.union(*questions)) == 90, "plain seeds 0, 1, 2 share all rows but two"


def test_settings_reach_the_task_and_the_prompt():
    config = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    (row,) = reasoning_gym_dataset("chain_sum", 1, config=config, system_prompt="Be brief.", answer_format="text")
    assert row.messages[0] == {"role": "system", "content": "Be brief."} and row.messages[1]["content"].endswith(" =")
    assert len(re.findall(r"\d", row.messages[1]["content"])) == 3
    assert row.completion[0]["content"] == row.reference
    assert judged(row, f" {row.reference}\n") == 1.0
    (row,) = reasoning_gym_dataset("leg_counting", 1, privileged="metadata.animals")
    assert row.privileged.startswith("{") and reasoning_gym_dataset("leg_counting", 1, privileged="none")[0].privileged is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"task": "chess"}, r"has no task 'chess'; it has ab, acre"),
        (
            {"task": "leg_counting", "config": {"legs": 3}},
            r"does not take dataset\.config .*unexpected keyword argument 'legs'",
        ),
        ({"task": "leg_counting", "config": {"max_animals": 0}}, r"max_animals must be >= min_animals"),
        ({"task": "leg_counting", "privileged": "metadata.legs"}, r"has no metadata\.legs.*it has answer, metadata\."),
        ({"task": "countdown"}, r"evaluates what the model writes as a program.*allow_evaluated_answers: true"),
    ],
)
def test_wrong_arguments_of_process_environments_are_refused(arguments, told):
    with pytest.raises(InputError, match=told):
        reasoning_gym_dataset(n=1, **arguments)


# ------------------------------------------------------------------------------------------- verifiers


def test_the_tasks_own_verifier_judges_the_last_answer():
    for row in reasoning_gym_dataset("leg_counting", 4):
        assert judged(row, f"<answer>0</answer> no: <answer> {row.reference} </answer>") == 1.0
        for wrong in ("", row.reference, f"<answer>{row.reference}0</answer>", f"<answer>{row.reference}"):
            expected = reasoning_gym.create_dataset("leg_counting", size=1, seed=0).score_answer(
                f"{row.reference}0" if "</answer>" in wrong else None, entry_of(row)
            )
            assert judged(row, wrong) == expected < 1.0


def test_a_verifier_accepts_each_of_several_right_answers():
    (row,) = reasoning_gym_dataset("n_queens", 1, allow_evaluated_answers=True)
    solutions = entry_of(row)["metadata"]["valid_answers"]
    assert [judged(row, f"<answer>{solution}</answer>") for solution in solutions] == [1.0] * len(solutions)


# Files of tasks that evaluate texts of their own making, never the model's; read by hand in 0.1.23.
OWN_TEXTS = {"basic_arithmetic", "bitwise_arithmetic", "gsm_symbolic", "number_sorting", "codeio", "propositional_logic"}


def test_every_verifier_that_evaluates_what_it_is_given_is_known():
    found = set()
    for task, (dataset, _) in reasoning_gym.factory.DATASETS.items():
        source = inspect.getsource(sys.modules[dataset.__module__])
        if re.search(r"(?<!literal_)(?<![\w.])(eval|exec)\(|parse_expr\(|sympify\(", source):
            found.add(task)
    assert found - OWN_TEXTS == EVALUATED and len(reasoning_gym.factory.DATASETS) > 90


# ------------------------------------------------------------------------------------------- recipes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train_base("reasoning_gym/base", tmp_path_factory.mktemp("base"), batch_size=8)


@pytest.mark.parametrize("method", RECIPES)
def test_both_recipes_train_on_a_task(method, base, tmp_path):
    recipe = set_up(RECIPES[method], load_config(f"reasoning_gym/{method}", settings(base, tmp_path)))
    try:
        seen = [
            (recipe._data.tokenizer.decode(p.student), recipe._data.tokenizer.decode(p.teacher))
            for _, p in recipe._data.prompts
        ]
        assert seen and all("The answer is" in teacher and "The answer is" not in student for student, teacher in seen)
        recipe.train()
    finally:
        cleanup()
    assert_trained(tmp_path)


def test_the_command_of_the_config_runs_it(base, tmp_path):
    run_config("pi_distill_distributed", "reasoning_gym/pi_distill", settings(base, tmp_path))
    assert_trained(tmp_path)
