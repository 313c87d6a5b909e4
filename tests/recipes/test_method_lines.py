"""Test each line of a recipe's method part that a small slip could change without stopping the run."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from pidistill.objectives.base import Objective
from pidistill.rollouts import rollout_seed
from pidistill.scoring.score import score
from pidistill.teachers import LiveTeacher, Teacher
from pidistill.types import Rollout
from tests.support.builders import batch_of
from tests.support.runs import metrics, run, small_config

NAMES = ["pi_distill", "opsd"]
STEEP = {"optimizer__lr": 0.03, "lr_scheduler": None}  # one step moves the weights far enough to be told apart
PPO = {"objective__student_term": "ppo"}  # π-Distill's `sft` has no ratio
FROZEN = {"_component_": "pidistill.teachers.FrozenTeacher"}
EMA = {"_component_": "pidistill.teachers.EMATeacher", "rate": 0.5}


def samples_of(name: str, base: Path, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """What the recipe asks the collector for in each round of a run."""
    asked = []

    def watch(recipe: Any) -> None:
        collect = recipe._rounds._play

        def watched(model: Any, **arguments: Any) -> Any:
            asked.append(arguments)
            return collect(model, **arguments)

        recipe._rounds._play = watched

    run(name, small_config(name, base, folder, **changes), watch)
    return asked


# ------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("name", NAMES)
def test_every_sample_of_a_run_has_its_own_seed_and_another_run_has_others(name, tiny_base, tmp_path):
    runs = [samples_of(name, tiny_base, tmp_path / str(seed), seed=seed, max_steps=3) for seed in (0, 1)]
    for seed, rounds in enumerate(runs):
        expected = [[rollout_seed(seed, r, group, member) for group in range(2) for member in range(3)] for r in range(3)]
        assert [asked["seeds"] for asked in rounds] == expected
        assert [list(asked["groups"]) for asked in rounds] == [[0, 1]] * 3
    every = [seed for rounds in runs for asked in rounds for seed in asked["seeds"]]
    assert len(set(every)) == len(every) == 2 * 3 * 6


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_of_rounds_visits_each_row_once_and_each_epoch_has_its_own_order(name, tiny_base, tmp_path):
    rounds = samples_of(name, tiny_base, tmp_path, dataset__max_rows=6, max_steps=6)
    assert all(len(asked["examples"]) == len(asked["prompts"]) == 2 for asked in rounds)
    rows = [example.id for asked in rounds for example in asked["examples"]]
    first, second = rows[:6], rows[6:]
    assert len(set(first)) == 6 and sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_scored_at_the_temperature_that_they_were_drawn_at(name, tiny_base, tmp_path):
    changes = PPO if name == "pi_distill" else {}
    run(name, small_config(name, tiny_base, tmp_path, sampler__temperature=0.6, max_steps=2, **changes))
    for row in metrics(tmp_path):
        assert row["sampler_mismatch_max_nats"] < 1e-3
        assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-3)


# ------------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_a_mean_over_the_tokens_of_the_rollouts_that_are_kept(name, tiny_base, tmp_path):
    """A loss of one nat per token then has the mean 1, however many rollouts were dropped."""
    sampled, kept = [], []

    def drop_some(recipe: Any) -> None:
        advantages, token_loss = recipe._objective.advantages, recipe._objective.token_loss

        def some_kept(rollouts: list[Rollout], step: int) -> list:
            answer = [dataclasses.replace(a, keep=i % 3 != 0) for i, a in enumerate(advantages(rollouts, step))]
            sampled.append(sum(r.policy_tokens for r in rollouts))
            kept.append(sum(r.policy_tokens for r, a in zip(rollouts, answer, strict=True) if a.keep))
            return answer

        def one_nat(batch: Any, scores: Any, step: int) -> Any:
            answer = token_loss(batch, scores, step)
            return dataclasses.replace(answer, loss=0.0 * answer.loss + 1.0)

        recipe._objective.advantages, recipe._objective.token_loss = some_kept, one_nat

    run(name, small_config(name, tiny_base, tmp_path, max_steps=2, micro_batch_tokens=150), drop_some)
    rows = metrics(tmp_path)
    assert [row["policy_tokens"] for row in rows] == kept
    assert all(0 < some < every for some, every in zip(kept, sampled, strict=True))
    assert [row["loss"] for row in rows] == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_ema_teacher_follows_each_step_that_is_applied_and_no_other(name, tiny_base, tmp_path):
    averages, students = [], []

    def poison_the_second_step(recipe: Any) -> None:
        token_loss, update = recipe._objective.token_loss, recipe.update

        def poisoned_loss(batch: Any, scores: Any, step: int) -> Any:
            answer = token_loss(batch, scores, step)
            return dataclasses.replace(answer, loss=answer.loss * (float("nan") if step == 1 else 1.0))

        def look() -> None:
            averages.append(recipe._teacher.state_dict()["output.weight"].clone())
            students.append(recipe._model.output.weight.detach().clone())

        def watched(*arguments: Any) -> None:
            update(*arguments)
            look()

        recipe._objective.token_loss, recipe.update = poisoned_loss, watched
        look()

    run(name, small_config(name, tiny_base, tmp_path, teacher=EMA, max_steps=3, **STEEP), poison_the_second_step)
    assert torch.equal(averages[0], students[0])
    assert [not torch.equal(a, b) for a, b in itertools.pairwise(students)] == [True, False, True]
    for step, applied in ((1, True), (2, False), (3, True)):
        expected = torch.lerp(averages[step - 1], students[step], 0.5) if applied else averages[step - 1]
        assert torch.equal(averages[step], expected), step
        assert not applied or not torch.equal(averages[step], averages[step - 1])


# ------------------------------------------------------------------------------------------- behaviour


def behaviour_gaps(name: str, base: Path, folder: Path, other: str, **changes: Any) -> tuple[list[float], list[float]]:
    """Per round, how far the behaviour values are from those of the right teacher, and from those of the wrong one.

    ``other`` names the wrong teacher: "live" or "own" (the component `teacher`).
    """
    right, wrong = [], []

    def watch(recipe: Any) -> None:
        score_behaviour = recipe.score_behaviour

        def values_under(rollouts: list[Rollout], teacher: Teacher) -> torch.Tensor:
            objective: Objective = recipe._objective
            batch = batch_of(rollouts, pad_id=recipe._data.tokenizer.pad_id)
            temperature = recipe._sampler.temperature
            scores = score(recipe._model, batch, objective.behaviour_request(), teacher=teacher, temperature=temperature)
            return objective.behaviour_values(scores)

        @torch.no_grad()
        def watched(rollouts: list[Rollout]) -> None:
            score_behaviour(rollouts)
            found = torch.tensor([value for rollout in rollouts for value in rollout.behaviour_values])
            teachers = {"live": LiveTeacher(), "own": recipe._teacher}
            wrong.append(float((found - values_under(rollouts, teachers.pop(other))).abs().max()))
            (expected,) = teachers.values()
            right.append(float((found - values_under(rollouts, expected)).abs().max()))

        recipe.score_behaviour = watched

    settings = STEEP | {"teacher": FROZEN, "max_steps": 3, "objective__kl_mode": "reward_rb", "sampler__temperature": 0.8}
    run(name, small_config(name, base, folder, **settings | changes), watch)
    return right, wrong


@pytest.mark.parametrize(
    ("name", "other", "changes"),
    [
        ("opsd", "live", {}),  # the student samples, the `teacher` judges
        ("pi_distill", "own", {"objective__alpha": 0.5}),  # the live weights teach and sample
        ("pi_distill", "live", {"objective__alpha": 0.0}),  # the `teacher`'s weights sample
    ],
)
def test_behaviour_is_scored_under_the_weights_of_the_right_teacher(name, other, changes, tiny_base, tmp_path):
    right, wrong = behaviour_gaps(name, tiny_base, tmp_path, other, **changes)
    assert len(right) == 3 and max(right) < 1e-4
    assert min(wrong[1:]) > 1e-2  # equal before the first update


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("opsd", {}),
        ("pi_distill", {"objective__alpha": 0.5}),
        ("pi_distill", {"objective__alpha": 0.0, "objective__student_term": "ppo"}),
    ],
)
def test_importance_weights_are_of_the_weights_that_sampled(name, changes, tiny_base, tmp_path):
    """Where sampler and trainer compute alike, each weight is 1, also in rounds after the first update."""
    weights = []

    def watch(recipe: Any) -> None:
        score_behaviour = recipe.score_behaviour

        def watched(rollouts: list[Rollout]) -> None:
            score_behaviour(rollouts)
            weights.extend(value for rollout in rollouts for value in rollout.importance_weights)

        recipe.score_behaviour = watched

    importance = {"_component_": "pidistill.scoring.mismatch.TruncatedImportanceWeights"}
    settings = STEEP | {"teacher": FROZEN, "max_steps": 3, "importance_weights": importance, "sampler__temperature": 0.8}
    run(name, small_config(name, tiny_base, tmp_path, **settings | changes), watch)
    assert weights == pytest.approx([1.0] * len(weights), abs=1e-3) and weights
