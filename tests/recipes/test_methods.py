"""Test the steps between sampling and update in whole runs: guided groups, dataset completions, hindsight, the SFT term."""

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from pidistill.data import epoch_order
from pidistill.envs.base import EnvStep
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.scoring.score import score
from pidistill.types import Message, Rollout, ScoreRequest
from tests.support.builders import batch_of
from tests.support.forks import launch_several
from tests.support.runs import (
    ROWS,
    Stop,
    assert_close_rows,
    assert_same_tensors,
    back_to_checkpoint,
    metrics,
    run,
    small_config,
    training_state,
    weights,
)
from tests.support.worlds import Episode, VariedEnvironment, recorded


@dataclass
class PickyEnvironment(VariedEnvironment):
    """All or nothing: most groups of two fail, and which ones does not depend on the process."""

    def step(self, state: Episode, turn: Message, *, truncated: bool) -> EnvStep:
        answer = super().step(state, turn, truncated=truncated)
        return replace(answer, reward=float(answer.reward == 1.0))


@dataclass
class SteppedEnvironment(VariedEnvironment):
    """A reward for the first of the two turns too."""

    def step(self, state: Episode, turn: Message, *, truncated: bool) -> EnvStep:
        answer = super().step(state, turn, truncated=truncated)
        return answer if answer.done else replace(answer, reward=len(state.turns[0]) % 4 / 4)


STEPPED = {"environment___component_": "tests.recipes.test_methods.SteppedEnvironment"}
PICKY = {"environment___component_": "tests.recipes.test_methods.PickyEnvironment"}
GUIDE = {"prompts_per_round": 4, "group_size": 2, "max_steps": 3, **PICKY}
HINDSIGHT = {"prompts_per_round": 4, "group_size": 3, "max_steps": 3}
EXPERT = {"dataset__completion": "actions"}


def watch(recipe: Any, method: str, seen: list) -> None:
    """Append (arguments, result) of every call of a method of the recipe."""
    original = getattr(recipe, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        seen.append((args, kwargs, list(result)))
        return result

    setattr(recipe, method, watched)


def rounds_of(name: str, base: Path, folder: Path, prepare: Callable[[Any], None] | None = None, **changes: Any) -> list:
    """The rollouts of each round of a run."""
    seen = []

    def before(recipe: Any) -> None:
        watch(recipe, "sample_round", seen)
        if prepare is not None:
            prepare(recipe)

    run(name, small_config(name, base, folder, **changes), before)
    return [result for _, _, result in seen]


# ------------------------------------------------------------------------------------------- Guide-GRPO


def assert_sampled_from_its_view(recipe: Any, rollouts: list[Rollout]) -> None:
    """μ is the log-prob under the prompt of the view that `sampled_by` names, and under no other."""
    batch = batch_of(rollouts, pad_id=recipe._data.tokenizer.pad_id)
    with torch.no_grad():
        scores = score(recipe._model, batch, ScoreRequest(False, False, entropy=False))
    by_teacher = torch.tensor([rollouts[i].sampled_by == "teacher" for i in batch.rollout_index.tolist()])
    own = torch.where(by_teacher, scores.teacher_logprobs, scores.student_logprobs)
    other = torch.where(by_teacher, scores.student_logprobs, scores.teacher_logprobs)
    torch.testing.assert_close(batch.ratio_logprobs, own, atol=1e-4, rtol=1e-4)
    assert (batch.ratio_logprobs - other).abs().max() > 0.05


def test_a_group_that_fails_is_sampled_again_with_the_pi_replaced_and_counted(tiny_base, tmp_path):
    calls = []

    def prepare(recipe):
        watch(recipe, "sample_groups", calls)
        sample_round = recipe.sample_round

        def checked():
            rollouts = sample_round()
            assert_sampled_from_its_view(recipe, rollouts)
            return rollouts

        recipe.sample_round = checked

    trained = rounds_of("guide_grpo", tiny_base, tmp_path, prepare, **GUIDE)
    rows = metrics(tmp_path)
    assert len(calls) == 2 * len(trained) == 2 * len(rows) == 6
    guided = []
    for row, rollouts, first, second in zip(rows, trained, calls[0::2], calls[1::2], strict=True):
        assert first[0][-1] == "student" and second[0][-1] == "teacher"
        failed = {g for g in range(4) if not any(r.reward > 0 for r in first[2] if r.group == g)}
        assert {r.group for r in second[2]} == failed
        assert [r.sampled_by for r in second[2]] == ["teacher"] * 2 * len(failed)
        kept = [r for r in first[2] if r.group not in failed]
        assert rollouts == kept + second[2] and all(r.sampled_by == "student" for r in kept)
        assert Counter(r.group for r in rollouts) == dict.fromkeys(range(4), 2)
        assert row["guided_groups"] == len(failed) and row["rollouts"] == 8 + 2 * len(failed)
        guided.append(len(failed))
        for again in second[2]:
            (same, *_) = [r for r in first[2] if r.group == again.group]
            assert again.example is same.example and again.prompts == same.prompts and again.completion != same.completion
    assert 0 < sum(guided) < 12 and any(r.reward > 0 for call in calls[1::2] for r in call[2])


def test_without_privileged_information_nothing_is_guided_and_it_is_grpo(tiny_base, tmp_path):
    ours = rounds_of("guide_grpo", tiny_base, tmp_path / "guide", privileged__control="none", **GUIDE)
    assert all(r.sampled_by == "student" for rollouts in ours for r in rollouts)
    objective = {"_component_": "pidistill.objectives.GRPO", "advantage": "standardised"}
    run("guide_grpo", small_config("guide_grpo", tiny_base, tmp_path / "grpo", objective=objective,
                                   privileged__control="none", **GUIDE))  # fmt: skip
    assert_same_tensors(weights(tmp_path / "guide"), weights(tmp_path / "grpo"))


def test_a_penalty_makes_no_group_a_failed_one(tiny_base, tmp_path):
    penalty = [{"_component_": "tests.rewards.test_shaping.Fixed", "value": -5.0}]
    guided = []
    for name, shaping in (("plain", None), ("shaped", penalty)):
        changes = GUIDE | {"max_steps": 1, "prompts_per_round": 6, "reward_shaping": shaping}
        run("guide_grpo", small_config("guide_grpo", tiny_base, tmp_path / name, **changes))
        guided.append(metrics(tmp_path / name)[0]["guided_groups"])
    assert guided[0] == guided[1] < 6


# ------------------------------------------------------------------------------------------- GKD


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_gkd_samples_everything_at_lmbda_1_and_nothing_at_lmbda_0(lmbda, tiny_base, tmp_path):
    """lmbda 1 needs no completion in the dataset; lmbda 0 samples nothing and trains on the expert's actions."""
    changes = {"objective__lmbda": lmbda, "group_size": 1, "prompts_per_round": 4, "max_steps": 2}
    changes |= EXPERT if lmbda == 0 else {"dataset__completion": None}
    rollouts = rounds_of("gkd", tiny_base, tmp_path, **changes)
    assert [len(r) for r in rollouts] == [4, 4]
    rows = metrics(tmp_path)
    for own, row in zip(rollouts, rows, strict=True):
        assert all((r.sampled_logprobs is None) == (lmbda == 0) for r in own)
        assert row["rollouts"] == (0 if lmbda == 0 else 4)
        assert ("reward_mean" in row) == (lmbda == 1) and ("ess_frac" in row) == (lmbda == 1)
        assert row["loss"] > 0 and row["kl_teacher_student_nats"] > 0
        assert row["policy_tokens"] == sum(r.policy_tokens for r in own)
    if lmbda == 0:
        assert all(r.turns == r.example.completion and r.prompts.has_privileged for own in rollouts for r in own)
        order = epoch_order(ROWS, 0, 0, 8)
        assert [r.example.id for own in rollouts for r in own] == [f"tiny_world train row {row}" for row in order]


def test_gkds_coin_is_fair_per_prompt_and_the_same_on_every_rank(tiny_base, tmp_path):
    recipes = []
    changes = {"objective__lmbda": 0.7, "group_size": 1, "prompts_per_round": 8, "max_steps": 3, **EXPERT}
    rollouts = rounds_of("gkd", tiny_base, tmp_path, recipes.append, **changes)
    (recipe,) = recipes
    for own, row in zip(rollouts, metrics(tmp_path), strict=True):
        assert sorted(r.group for r in own) == list(range(8))
        sampled = [r for r in own if r.sampled_logprobs is not None]
        assert row["rollouts"] == len(sampled)
        assert ("ess_frac" in row) == (len(sampled) == len(own)), "a ratio to nobody"
    given = [[r.group for r in own if r.sampled_logprobs is None] for own in rollouts]
    assert len({tuple(g) for g in given}) > 1, "every round tosses the same"
    groups = [(g, g % ROWS) for g in range(3000)]
    chosen = {r.group for r in recipe.dataset_completions(groups, 3)}
    assert abs(len(chosen) / 3000 - 0.3) < 3 * math.sqrt(0.3 * 0.7 / 3000)
    shares = [{r.group for r in recipe.dataset_completions(groups[rank::2], 3)} for rank in (0, 1)]
    assert shares[0] | shares[1] == chosen
    assert {r.group for r in recipe.dataset_completions(groups, 4)} != chosen


def test_a_missing_completion_is_said_before_anything_runs(tiny_base, tmp_path):
    from pidistill.errors import InputError

    with pytest.raises(InputError, match="has no assistant turn to learn from; check the dataset's completion key"):
        run("gkd", small_config("gkd", tiny_base, tmp_path, objective__lmbda=0.5, dataset__completion=None))


# ------------------------------------------------------------------------------------------- hindsight


def hindsight_rounds(base: Path, folder: Path, **changes: Any) -> tuple[list, list, Any]:
    """(prompts before, rollouts after) per round, and the recipe."""
    before, recipes = [], []

    def prepare(recipe):
        recipes.append(recipe)
        sample_groups = recipe.sample_groups

        def remember(*args, **kwargs):
            rollouts = sample_groups(*args, **kwargs)
            before.append([(list(r.prompts.student), list(r.completion), r.example.id) for r in rollouts])
            return rollouts

        recipe.sample_groups = remember

    return before, rounds_of("sdpo", base, folder, prepare, **(HINDSIGHT | changes)), recipes[0]


def writers_text(recipe: Any, rollout: Rollout, rollouts: list[Rollout]) -> set[str | None]:
    """All texts that a successful sibling, or else the verifier, could have given this rollout."""
    hindsight = recipe._hindsight
    siblings = [r for r in rollouts if r.group == rollout.group and r is not rollout and r.reward >= 1.0]
    if siblings:
        return {hindsight.sibling(rollout.example, r.turns) for r in siblings}
    return {hindsight.feedback(rollout.example, rollout.turns)}


def test_teachers_see_a_siblings_success_or_the_verifiers_word_and_students_what_they_saw(tiny_base, tmp_path):
    before, after, recipe = hindsight_rounds(tiny_base, tmp_path)
    kinds = Counter()
    for old, rollouts, row in zip(before, after, metrics(tmp_path), strict=True):
        assert [(r.prompts.student, r.completion, r.example.id) for r in rollouts] == old
        for r in rollouts:
            text = r.example.privileged
            assert text in writers_text(recipe, r, rollouts)
            assert r.prompts == PrivilegedPrompt(template="{privileged}").build(r.example, recipe._data.tokenizer).pair
            assert (r.prompts.teacher == r.prompts.student) == (text is None)
            kinds["pi" if text else "none"] += 1
        share = sum(r.prompts.has_privileged for r in rollouts) / len(rollouts)
        assert row["rollouts_with_pi_frac"] == pytest.approx(share) and row["hindsight_too_long"] == 0
    assert kinds["pi"] > 5


def test_the_control_none_of_hindsight_is_grpo(tiny_base, tmp_path):
    """SDPO whose teacher is told nothing: no rollout has PI, and the update is GRPO's to the bit."""
    _, after, _ = hindsight_rounds(tiny_base, tmp_path / "none", privileged__control="none")
    assert not any(r.prompts.has_privileged for rollouts in after for r in rollouts)
    assert {row["rollouts_with_pi_frac"] for row in metrics(tmp_path / "none")} == {0.0}
    objective = {"_component_": "pidistill.objectives.GRPO", "advantage": "standardised"}
    cfg = small_config("rl", tiny_base, tmp_path / "grpo", objective=objective, privileged__control="none",
                       dataset__privileged="none", **HINDSIGHT)  # fmt: skip
    run("rl", cfg)
    ours, theirs = weights(tmp_path / "none"), weights(tmp_path / "grpo")
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-7)


def test_the_control_shuffled_of_hindsight_never_shows_the_own_group(tiny_base, tmp_path):
    _, plain, _ = hindsight_rounds(tiny_base, tmp_path / "plain", max_steps=1)
    _, after, _ = hindsight_rounds(tiny_base, tmp_path / "shuffled", max_steps=1, privileged__control="shuffled")
    shown = 0
    for r, own in zip(after[0], plain[0], strict=True):
        assert (r.completion, r.prompts.student) == (own.completion, own.prompts.student)
        text = r.example.privileged
        if text is not None:
            shown += 1
            assert text != own.example.privileged
            givers = [other for other in plain[0] if other.example.privileged == text]
            assert any(other.group != r.group for other in givers)
    assert shown > 2


# ------------------------------------------------------------------------------------------- sft_weight


def first_gradient(name: str, base: Path, folder: Path, **changes: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The gradient of the first update, before clipping, and the recipe."""
    found = {}

    def prepare(recipe):
        found["recipe"] = recipe

        def step(*args, **kwargs):
            found["grads"] = {n: p.grad.clone() for n, p in recipe._model.named_parameters()}
            raise Stop

        recipe._updates.step = step

    run(name, small_config(name, base, folder, **changes), prepare)
    return found["grads"], found["recipe"]


@pytest.mark.parametrize("name", ["opsd", "pi_distill"])
def test_the_sft_term_adds_its_weight_times_the_supervised_gradient(name, tiny_base, tmp_path):
    without, recipe = first_gradient(name, tiny_base, tmp_path / "without", **EXPERT)
    with_sft, recipe = first_gradient(name, tiny_base, tmp_path / "with", sft_weight=0.7, sft_batch_size=5, **EXPERT)

    rows = epoch_order(ROWS, 0, 0, 5)
    recipe._model.zero_grad()
    total, tokens = 0.0, 0
    for row in rows:
        example, prompts = recipe._data.prompts[row]
        rollout = recipe._supervised.demonstrations[row]
        assert rollout.turns == example.completion and rollout.prompts is prompts
        ids = prompts.student + rollout.completion
        logp = torch.log_softmax(recipe._model(torch.tensor([ids])), -1)[0]
        for t, is_policy in enumerate(rollout.policy_mask):
            at = len(prompts.student) + t
            total, tokens = total - logp[at - 1, ids[at]] * is_policy, tokens + is_policy
    (total / tokens).backward()
    for key, p in recipe._model.named_parameters():
        torch.testing.assert_close(
            with_sft[key], without[key] + 0.7 * p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k} {m}"
        )
    assert any(float((0.7 * p.grad).abs().max()) > 1e-3 for p in recipe._model.parameters())


def test_the_sft_term_trains_where_no_rollout_is_kept_and_takes_new_rows_every_step(tiny_base, tmp_path):
    """Equal rewards and `drop_zero_advantage: row`: no policy token, and still a step."""
    objective = {"_component_": "pidistill.objectives.GRPO", "drop_zero_advantage": "row"}
    changes = {"objective": objective, "sft_weight": 0.5, "sft_batch_size": 3, "max_steps": 2, "prompts_per_round": 1}
    changes |= {"group_size": 1, **EXPERT}
    run("rl", small_config("rl", tiny_base, tmp_path, **changes))
    rows = metrics(tmp_path)
    assert [row["policy_tokens"] for row in rows] == [0, 0] and [row["empty_steps"] for row in rows] == [0, 0]
    assert all(row["loss"] == pytest.approx(0.5 * row["sft_loss"]) and row["sft_loss"] > 0 for row in rows)
    assert rows[0]["sft_loss"] != rows[1]["sft_loss"]


# ------------------------------------------------------------------------------------------- resume, and two processes

SCENARIOS = {
    "guide": ("guide_grpo", GUIDE | {"prompts_per_round": 3}),
    "hindsight": ("sdpo", HINDSIGHT | {"prompts_per_round": 3, "sft_weight": 0.3, "sft_batch_size": 3, **EXPERT}),
    "hindsight_shuffled": ("sdpo", HINDSIGHT | {"prompts_per_round": 3, "privileged__control": "shuffled", "max_steps": 2}),
    "gkd": ("gkd", {"objective__lmbda": 0.5, "group_size": 1, "prompts_per_round": 5, "max_steps": 3, **EXPERT}),
    "sft_term": ("pi_distill", {"sft_weight": 0.4, "sft_batch_size": 3, "max_steps": 2, **EXPERT}),
    "snis": (
        "pi_distill",
        {"objective__student_term": "snis", "objective__snis_beta": 0.5, "prompts_per_round": 3, "max_steps": 2},
    ),
    "turn_returns": ("rl", {"prompts_per_round": 3, "max_steps": 2, "objective__advantage": "turn_returns", **STEPPED}),
}


def scenario(name: str, base: Path, folder: Path, **more: Any):
    method, changes = SCENARIOS[name]
    return method, small_config(method, base, folder, **(changes | {"environment__record": str(folder / "episodes")} | more))


@pytest.mark.parametrize("name", ["guide", "hindsight", "gkd"])
def test_a_killed_run_resumes_to_the_bit(name, tiny_base, tmp_path):
    """Guided groups, hindsight with an SFT term, and GKD's coin depend on round and step alone."""
    changes = {"max_steps": 4, "save_every_steps": 2}
    run(*scenario(name, tiny_base, tmp_path / "whole", **changes))
    back_to_checkpoint(tmp_path / "whole", tmp_path / "killed")
    run(*scenario(name, tiny_base, tmp_path / "killed", **changes, resume_from_checkpoint=True))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert_same_tensors(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert_same_tensors(training_state(tmp_path / "killed"), training_state(tmp_path / "whole"))


@pytest.fixture(scope="session")
def two(tiny_base, tmp_path_factory) -> Path:
    """A folder with what two processes left of every scenario."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "methods_with_two_processes"
    with FileLock(root / "methods_with_two_processes.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            launch_several(folder / "several", {name: scenario(name, tiny_base, folder / name) for name in SCENARIOS})
            (folder / "done").touch()
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_do_what_one_does(name, two, tiny_base, tmp_path):
    run(*scenario(name, tiny_base, tmp_path))
    assert recorded(tmp_path / "episodes") == recorded(two / name / "episodes")
    assert_close_rows(metrics(two / name), metrics(tmp_path))
    ours, theirs = weights(two / name), weights(tmp_path)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_the_scenarios_of_two_processes_use_what_they_are_named_for(two):
    assert sum(row["guided_groups"] for row in metrics(two / "guide")) > 0
    for name in ("hindsight", "hindsight_shuffled"):
        assert all(row["rollouts_with_pi_frac"] > 0 for row in metrics(two / name))
    assert 0 < sum(row["rollouts"] for row in metrics(two / "gkd")) < 15
    assert all(row["sft_loss"] > 0 for row in metrics(two / "sft_term"))
    assert all(1.0 <= row["snis_ess"] <= 3.0 for row in metrics(two / "snis"))
