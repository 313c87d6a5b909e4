"""Test parts that shape a reward, and rewards made of checks: what they add, what they leave alone, what they refuse."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pidistill.distributed.run import Run
from pidistill.envs import SingleTurn
from pidistill.errors import InputError
from pidistill.privileged.hindsight import Hindsight, Transcript
from pidistill.rewards import (
    Constraints,
    ExactMatch,
    LeakPenalty,
    LengthPenalty,
    OverlongPenalty,
    Shaping,
    add_shaping,
    build_shaping,
)
from pidistill.rollouts import CollectResult
from pidistill.rollouts.selections import Interventions, Successes
from pidistill.training.evaluation import mean_success
from pidistill.training.metrics import rollout_sums
from pidistill.types import Example, PromptPair, Rollout
from tests.support.episodes import Counting, Script, collect

EXAMPLE = Example("row 0", [{"role": "user", "content": "q"}], reference="72")
LENGTH = LengthPenalty()


def episode(lengths, texts=None, reward=1.0):
    """A rollout of turns so long that earned ``reward``, all of it in its last turn."""
    texts = texts or [""] * len(lengths)
    turns = [{"role": "assistant", "content": text} for text in texts]
    given = {"reward": reward, "turn_rewards": [0.0] * (len(lengths) - 1) + [reward], "turn_policy_tokens": list(lengths)}
    return Rollout(EXAMPLE, PromptPair([1], [1], False), [], [], [], "student", 0, "done", turns, **given)


def slow_penalty(n):
    """The penalty's curve by adding up its slope, token by token."""
    total = 0.0
    for token in range(2000, min(n, 8000)):
        middle = token + 0.5
        first = middle < 5000
        total -= 0.1 * math.pi / 2 * math.sin(math.pi * (middle - 2000) / 3000) / 3000 if first else 0.1 / 3000
    return total


@pytest.mark.parametrize("n", [0, 1999, 2000, 2001, 3500, 4999, 5000, 5001, 6500, 8000, 8001, 10**6])
def test_the_length_penalty_follows_its_curve(n):
    assert LENGTH.of_turn(n) == pytest.approx(slow_penalty(n), abs=1e-8)


def test_the_length_penalty_has_the_papers_points():
    assert [LENGTH.of_turn(n) for n in (2000, 3500, 5000, 8000, 99999)] == pytest.approx([0.0, -0.05, -0.1, -0.2, -0.2])
    assert LENGTH(episode([1000, 5000, 9000])) == pytest.approx([0.0, -0.1 / 3, -0.2 / 3])  # the mean over turns


@given(st.lists(st.integers(0, 20_000), max_size=6), st.sampled_from([1.0, 0.5, 0.0, -1.0]))
def test_long_turns_cost_only_where_something_was_earned(lengths, reward):
    values = LENGTH(episode(lengths, reward=reward)) if lengths else LENGTH(episode([], reward=reward))
    assert len(values) == len(lengths) and all(value <= 0 for value in values)
    if reward <= 0:
        assert not any(values)
    elif lengths:
        assert math.fsum(values) == pytest.approx(math.fsum(map(LENGTH.of_turn, lengths)) / len(lengths))
        assert math.fsum(values) >= -0.2 - 1e-12


def test_the_floor_bounds_the_mean():
    steep = LengthPenalty(first=1.0, last=2.0)
    assert math.fsum(steep(episode([9000, 9000]))) == pytest.approx(-0.3)
    assert math.fsum(steep(episode([3000, 100]))) == pytest.approx(steep.of_turn(3000) / 2)


def test_the_leak_penalty_counts_each_phrase_in_each_turn():
    texts = ["the hint says: hint", "hints are no hint", ""]
    values = LeakPenalty(["hint"], penalty=0.1)(episode([1, 1, 1], texts))
    assert values == pytest.approx([-0.2, -0.1, 0.0])
    assert not math.copysign(1, values[2]) < 0, "no -0.0 in the log"


@pytest.mark.parametrize("view, tokens", [("student", 6), ("teacher", 10)])
def test_the_overlong_penalty_counts_the_ids_that_the_sampling_view_read(view, tokens):
    rollout = replace(episode([2, 2]), completion=[5] * 6, policy_mask=[True, True, False, False, True, True], sampled_by=view)
    rollout.prompts = PromptPair([1], [1, 2, 3], True)
    rollout.teacher_reads = [(2, 4, [7] * 6)]
    assert OverlongPenalty(limit=16, buffer=16)(rollout) == pytest.approx([0.0, -tokens / 16])


def test_shaping_adds_to_the_reward_and_leaves_the_task_reward():
    rollout = episode([5000, 1], ["hint", ""])
    add_shaping(rollout, [LENGTH, LeakPenalty(["hint"])])
    assert rollout.turn_rewards == pytest.approx([-0.05 - 0.1, 1.0])
    assert (rollout.reward, rollout.task_reward) == (pytest.approx(0.85), 1.0)
    assert rollout.reward_parts == pytest.approx({"length": -0.05, "leak": -0.1})
    assert math.fsum(rollout.turn_rewards) == pytest.approx(rollout.reward)
    with pytest.raises(InputError, match="two parts of the reward are called 'leak'"):
        add_shaping(rollout, [LeakPenalty(["other"])])
    assert isinstance(LENGTH, Shaping) and isinstance(LeakPenalty(["x"]), Shaping)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LengthPenalty(free_tokens=5000), "must rise"),
        (lambda: LengthPenalty(first=-0.1), "the first two are subtracted"),
        (lambda: LengthPenalty(last=math.inf), "the first two are subtracted"),
        (lambda: LengthPenalty(floor=0.1), "floor <= 0"),
        (lambda: LeakPenalty("hint"), "phrases of LeakPenalty is 'hint'"),
        (lambda: LeakPenalty([]), "phrases of LeakPenalty is"),
        (lambda: LeakPenalty(["a", ""]), "none empty"),
        (lambda: LeakPenalty(["a"], penalty=-1.0), "it is subtracted"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


LENGTH_NODE = {"_component_": "pidistill.rewards.LengthPenalty"}


@pytest.mark.parametrize(
    "node, message",
    [
        (LENGTH_NODE, "not a list of them; begin it with a dash"),
        ([LENGTH_NODE, "pidistill.rewards.LengthPenalty"], r"reward_shaping\[1\] is 'pidistill"),
        ([{"_component_": "pidistill.rewards.ExactMatch"}], r"reward_shaping\[0\] is ExactMatch\(.*, not a part"),
        ([LENGTH_NODE, LENGTH_NODE], "are called 'length'"),
    ],
)
def test_a_config_that_is_no_list_of_parts_is_refused_before_anything_is_sampled(node, message):
    with pytest.raises(InputError, match=message):
        build_shaping(OmegaConf.create({"node": node}).node)


def test_a_config_becomes_its_parts_in_order():
    leak = {"_component_": "pidistill.rewards.LeakPenalty", "phrases": ["hint"]}
    assert build_shaping(OmegaConf.create([LENGTH_NODE, leak])) == (LENGTH, LeakPenalty(["hint"]))
    assert build_shaping(None) == build_shaping(OmegaConf.create([])) == ()


# ---------------------------------------------------------------------------------------------- through the collector


class Fixed:
    """A part that gives each turn what it is told, or raises."""

    name = "fixed"

    def __init__(self, value):
        self.value = value

    def __call__(self, rollout):
        if isinstance(self.value, Exception):
            raise self.value
        return [self.value] * len(rollout.turn_rewards)


def test_collected_rollouts_are_shaped_truncated_turns_included():
    plain = collect(Script("x.q.", "x.yyy", max_new_tokens=8), Counting()).rollouts
    shaped = collect(Script("x.q.", "x.yyy", max_new_tokens=8), Counting(), shaping=[Fixed(-0.25)]).rollouts
    for before, after in zip(plain, shaped, strict=True):
        assert after.turn_rewards == [value - 0.25 for value in before.turn_rewards]
        assert after.task_reward == before.reward and after.reward == before.reward - 0.25 * len(before.turn_rewards)
        assert after.reward_parts == before.reward_parts | {"fixed": -0.25 * len(before.turn_rewards)}


@pytest.mark.parametrize("value, reason", [(ValueError("no"), "reward_error"), (math.nan, "reward_not_finite")])
def test_a_part_that_fails_costs_the_rollout(value, reason):
    result = collect(Script("x.q.", "q."), Counting(), shaping=[Fixed(value)])
    assert result.rollouts == [] and result.dropped[reason] == 2 and sum(result.dropped.values()) == 2


# ---------------------------------------------------------------------------------------------- what a success is


def shaped(task, penalty, group=0, word="x"):
    rollout = episode([1], [word], reward=task)
    rollout.group = group
    add_shaping(rollout, [Fixed(-penalty)])
    return rollout


def test_a_penalty_does_not_change_what_counts_as_a_success(tmp_path):
    rollouts = [shaped(1.0, 0.4, word="right"), shaped(0.0, -1.0, word="wrong")]  # the failure earns more
    one = Run(torch.device("cpu"), torch.float32, rank=0, world_size=1, seed=0, output_dir=tmp_path)
    for threshold, successes in ((0.5, 1), (1.0, 1)):  # by the reward with its penalty: 2 and 1
        assert rollout_sums(rollouts, threshold, [])["success_frac"] == successes
        assert mean_success(rollouts, threshold, one) == successes / 2
    assert rollout_sums(rollouts, 1.0, [])["reward_mean"] == pytest.approx(1.6)
    kept = Successes().select(rollouts, [], lambda cuts: pytest.fail("nothing is rewritten"), 0)
    assert [trace.completion[0]["content"] for trace in kept.traces] == ["right"]
    asked = []
    Interventions().select(rollouts, [], lambda cuts: asked.extend(cuts) or CollectResult([], {}, 0), 0)
    assert [cut.rollout.turns[0]["content"] for cut in asked] == ["wrong"]
    assert Hindsight(Transcript()).texts(rollouts) == [None, "assistant: right"]


# ---------------------------------------------------------------------------------------------- constraints


def said(text):
    return [{"role": "assistant", "content": text}]


def contains(word):
    return lambda example, turns: float(word in turns[-1]["content"])


CHECKS = {"a": contains("a"), "b": contains("b"), "c": contains("c")}


@pytest.mark.parametrize("text, decoupled, coupled", [("abc", 1.0, 1.0), ("ab", 2 / 3, 0.0), ("", 0.0, 0.0)])
def test_checks_earn_their_share_or_all_or_nothing(text, decoupled, coupled):
    for reward, expected in ((Constraints(CHECKS), decoupled), (Constraints(CHECKS, coupled=True), coupled)):
        judged = reward(EXAMPLE, said(text))
        assert judged.reward == pytest.approx(expected)
        assert judged.parts == {name: float(name in text) for name in CHECKS}


def test_constraints_are_weighted_and_the_environment_logs_their_parts():
    reward = Constraints({"right": ExactMatch(), "short": contains("7")}, weights={"right": 3.0})
    step = SingleTurn(reward).step(EXAMPLE, said("7")[0], truncated=False)
    assert (step.reward, step.reward_parts) == (0.25, {"right": 0.0, "short": 1.0})
    assert SingleTurn(reward).step(EXAMPLE, said("72")[0], truncated=False).reward == 1.0
    assert SingleTurn(ExactMatch()).step(EXAMPLE, said("72")[0], truncated=False).reward_parts == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"checks": {}}, "checks of Constraints is empty"),
        ({"checks": CHECKS, "weights": {"d": 1.0}}, "names 'd'"),
        ({"checks": CHECKS, "weights": {"a": 0.0}}, "must be above 0"),
        ({"checks": CHECKS, "weights": {"a": 1.0}, "coupled": True}, "is not read"),
    ],
)
def test_wrong_constraints_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Constraints(**arguments)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
def test_a_check_that_gives_a_number_outside_0_and_1_is_an_error(value):
    with pytest.raises(ValueError, match=r"which is not in \[0, 1\]"):
        Constraints({"a": lambda example, turns: value})(EXAMPLE, said("x"))
