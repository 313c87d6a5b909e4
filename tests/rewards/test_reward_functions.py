"""Test a plain function as a reward, named in the config by its dotted path."""

import pickle

import pytest
from omegaconf import OmegaConf

from pidistill.config import build, check_config
from pidistill.envs import SingleTurn
from pidistill.errors import InputError
from pidistill.rewards import Constraints, RewardWithParts
from pidistill.types import Example
from tests.support import own_rewards

PATH = "tests.support.own_rewards"
EXAMPLE = Example("row 0", [{"role": "user", "content": "q"}])


def environment(reward):
    node = OmegaConf.create({"environment": {"_component_": "pidistill.envs.SingleTurn", "reward": reward}})
    check_config(node, {"environment"})
    return build(node.environment)


def reward_of(environment, text):
    turn = {"role": "assistant", "content": text}
    return environment.step(environment.reset(EXAMPLE), turn, truncated=False)


@pytest.mark.parametrize("reward", [f"{PATH}.is_short", {"_component_": f"{PATH}.is_short"}])
def test_a_function_is_the_reward_by_its_path_or_as_a_component(reward):
    made = environment(reward)
    assert isinstance(made, SingleTurn) and made.reward is own_rewards.is_short
    assert [reward_of(made, text).reward for text in ("x" * 20, "x" * 21)] == [1.0, 0.0]


def test_other_arguments_of_the_function_come_from_the_config():
    made = environment({"_component_": f"{PATH}.is_short", "limit": 5})
    assert [reward_of(made, text).reward for text in ("x" * 5, "x" * 6)] == [1.0, 0.0]
    assert reward_of(pickle.loads(pickle.dumps(made)), "x" * 6).reward == 0.0  # as worker processes get it


def test_a_function_may_name_parts_and_stands_among_the_checks_of_constraints():
    assert reward_of(environment(f"{PATH}.with_parts"), "a b").reward_parts == {"words": 2.0}
    checks = {"short": {"_component_": f"{PATH}.is_short", "limit": 1}, "true": f"{PATH}.is_true"}
    made = environment({"_component_": "pidistill.rewards.Constraints", "checks": checks})
    assert isinstance(made.reward, Constraints)
    step = reward_of(made, "long")
    assert (float(step.reward), step.reward_parts) == (0.5, {"short": 0.0, "true": 1.0})


def test_a_function_that_needs_no_example_makes_the_reward_as_a_class_does():
    made = environment({"_component_": f"{PATH}.make_reward", "limit": 0})
    assert reward_of(made, "x").reward == 0.0 and reward_of(environment(f"{PATH}.make_reward"), "x").reward == 1.0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            f"{PATH}.of_one",
            r"of_one cannot be called with an example and the turns .*as def of_one\(example, turns\)",
        ),
        (f"{PATH}.gone", "component tests.support.own_rewards.gone cannot be found"),
        ({"_component_": f"{PATH}.is_short", "limits": 3}, r"reward.limits is not an argument of .*did you mean limit\?"),
        ({"_component_": f"{PATH}.is_short", "limit": "many"}, "environment.reward.limit=many must be"),
        (f"{PATH}.of_nothing", r"of_nothing gives 1\.0, which cannot be called .*def of_nothing\(example, turns\)"),
        (f"{PATH}.later", "environment.reward: tests.support.own_rewards.later is an async function, which gives no value"),
        (f"{PATH}.in_parts", "environment.reward: tests.support.own_rewards.in_parts is a generator"),
        (f"{PATH}.NotCalled", "environment.reward: .*NotCalled is a class whose objects cannot be called"),
        (
            {"_component_": "pidistill.rewards.Constraints", "checks": {"late": f"{PATH}.later"}},
            r"environment\.reward\.checks\.late: tests.support.own_rewards.later is an async function",
        ),
    ],
)
def test_a_wrong_reward_function_is_refused_with_the_config(reward, message):
    with pytest.raises(InputError, match=message):
        environment(reward)


@pytest.mark.parametrize(("arguments", "rewards"), [({}, [1.0, 0.0]), ({"limit": 21}, [1.0, 1.0])])
def test_a_reward_behind_a_decorator_that_hides_its_arguments_is_the_reward(arguments, rewards):
    made = environment({"_component_": f"{PATH}.decorated", **arguments})
    assert [reward_of(made, text).reward for text in ("x" * 20, "x" * 21)] == rewards


@pytest.mark.parametrize("node", [
    {"_component_": f"{PATH}.make_of_names", "threshold": 0.25}, f"{PATH}.hidden_maker", f"{PATH}.ByMeta",
])  # fmt: skip
def test_makers_that_hide_or_do_without_arguments_make_the_reward(node):
    assert reward_of(environment(node), "x").reward == 0.25


@pytest.mark.parametrize("word", ["reward", "feedback", "sibling"])
def test_a_list_may_hold_the_name_of_a_function_key(word):
    cfg = OmegaConf.create(
        {"privileged": {"_component_": "pidistill.privileged.PrivilegedPrompt", "leak_phrases": [word, "b"]}}
    )
    check_config(cfg, {"privileged"})
    assert list(cfg.privileged.leak_phrases) == [word, "b"]


def test_an_environment_of_the_user_may_take_a_reward_that_is_no_function():
    node = {"_component_": f"{PATH}.Holder", "reward": {"_component_": f"{PATH}.NotCalled"}}
    cfg = OmegaConf.create({"environment": node})
    check_config(cfg, {"environment"})
    assert isinstance(build(cfg.environment).reward, own_rewards.NotCalled)


def test_a_judge_may_be_a_function():
    node = {"_component_": "pidistill.privileged.Hindsight", "sibling": None, "feedback": f"{PATH}.say_look"}
    cfg = OmegaConf.create({"hindsight": node})
    check_config(cfg, {"hindsight"})
    assert build(cfg.hindsight).feedback is own_rewards.say_look


def test_a_reward_with_parts_is_a_number_that_can_be_sent_to_another_process():
    reward = RewardWithParts(0.5, {"a": 1.0})
    again = pickle.loads(pickle.dumps(reward))
    assert reward == 0.5 and (again, again.parts, again.reward) == (0.5, {"a": 1.0}, 0.5)
