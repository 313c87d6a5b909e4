"""The methods of 2026 in whole runs: what they need of the recipe beside their objective."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.models.llama3 import llama3

from pidistill.errors import InputError
from pidistill.training.rounds import RoundSizes
from tests.support.runs import assert_same_tensors, back_to_checkpoint, metrics, run, small_config, weights
from tests.support.served import Server, serving

ROUTED = {
    "_component_": "pidistill.teachers.RoutedTeacher",
    "key": "given_calls",
    "default": "0",
    "balance": "teachers",
    "teachers": {
        "0": {"_component_": "pidistill.teachers.FrozenTeacher"},
        "1": {"_component_": "pidistill.teachers.LiveTeacher"},
    },
}


def test_with_top_p_and_top_k_a_run_with_replay_has_ratio_1_and_no_mismatch_and_takes_masks(tiny_base, tmp_path):
    changes = {"sampler__top_p": 0.8, "sampler__top_k": 20, "max_steps": 2}
    mask = {"_component_": "pidistill.scoring.mismatch.MismatchMask"}
    run("opsd", small_config("opsd", tiny_base, tmp_path / "on", sampler__record_kept=True, mismatch_mask=mask, **changes))
    for row in metrics(tmp_path / "on"):
        assert row["sampler_mismatch_max_nats"] < 1e-4
        assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert row["masked_tokens"] == row["masked_rollouts"] == 0
    for refused, match in (
        ({"mismatch_mask": mask}, r"mismatch_mask compares π/μ with 1, .* set sampler\.record_kept=True"),
        ({"sampler__top_p": 0.7}, r"sampler\.top_p=0\.7 is below objective\.clip_low=0\.8"),
    ):
        with pytest.raises(InputError, match=match):
            run("opsd", small_config("opsd", tiny_base, tmp_path / "off", **changes | refused))


def test_a_run_with_a_snapshot_teacher_copies_at_the_same_steps_after_a_resume(tiny_base, tmp_path):
    changes = {"max_steps": 5, "save_every_steps": 1, "teacher__sync_steps": 2, "optimizer__lr": 0.03, "lr_scheduler": None}
    updates = []
    whole = small_config("rlsd", tiny_base, tmp_path / "whole", **changes)
    run("rlsd", whole, lambda recipe: watch_teacher(recipe, updates))
    assert updates == [False, True, False, True, False]
    back_to_checkpoint(tmp_path / "whole", tmp_path / "parts")
    run("rlsd", small_config("rlsd", tiny_base, tmp_path / "parts", resume_from_checkpoint=True, **changes))
    assert_same_tensors(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def watch_teacher(recipe, updates: list[bool]) -> None:
    """Note after each step whether the teacher's weights have just become the student's."""
    update = recipe.update

    def watched(*arguments):
        update(*arguments)
        updates.append(torch.equal(recipe._teacher.module.output.weight, recipe._model.output.weight))

    recipe.update = watched


def test_a_run_with_two_teachers_reports_each_and_unknown_keys_are_refused_before_weights_load(
    tiny_base, tmp_path, monkeypatch
):
    changes = {
        "teacher": ROUTED,
        "dataset__prefix_turns": [0, 1],
        "dataset__max_rows": 4,
        "max_steps": 2,
        "prompts_per_round": 4,
    }
    run("opsd_ucla", small_config("opsd_ucla", tiny_base, tmp_path / "run", **changes))
    rows = metrics(tmp_path / "run")
    assert any(f"kl_teacher_student_nats/{name}" in row for row in rows for name in (0, 1))
    assert all(math.isfinite(row["loss"]) for row in rows)
    wrong = changes | {"dataset__prefix_turns": [0, 1, 2]}
    monkeypatch.setattr("recipes.opsd_distributed.load_model", lambda *args, **more: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match=r"its given_calls is '2', and teacher\.teachers has 0, 1"):
        run("opsd_ucla", small_config("opsd_ucla", tiny_base, tmp_path / "wrong", **wrong))


def test_a_run_distils_episodes_that_the_curriculum_ends_and_counts_no_success_or_failure_of_them(tiny_base, tmp_path):
    """The environment of these runs has two turns; with a limit of one no episode that takes both is judged."""
    rounds = []

    def watch(recipe):
        sample_round = recipe.sample_round

        def sampled():
            rounds.append(sample_round())
            return rounds[-1]

        recipe.sample_round = sampled

    changes = {"turn_curriculum": {"start": 1, "every": 2}, "max_steps": 3, "sampler__max_new_tokens": 16}
    run("opsd", small_config("opsd", tiny_base, tmp_path, **changes), watch)
    rows = metrics(tmp_path)
    limits = [1, 1, 2]
    for row, rollouts, limit in zip(rows, rounds, limits, strict=True):
        assert all(len(r.turn_policy_tokens) <= limit for r in rollouts)
        judged = [r for r in rollouts if r.stop_reason != "curriculum"]
        assert all((r.reward is None) == (r.stop_reason == "curriculum") for r in rollouts)
        if judged:
            assert row["success_frac"] == pytest.approx(sum(r.reward >= 1.0 for r in judged) / len(judged))
        assert row["policy_tokens"] == sum(r.policy_tokens for r in rollouts)
    assert not any(r.stop_reason == "curriculum" for r in rounds[2])


def test_a_run_learns_from_a_served_teacher(tiny_base, tmp_path):
    module = llama3(vocab_size=85, num_layers=1, num_heads=4, num_kv_heads=4, embed_dim=32, max_seq_len=96, intermediate_dim=64)
    with serving(Server(module)) as url:
        node = {"_component_": "pidistill.scoring.served_teacher.ServedTeacher", "base_url": url, "model": "big"}
        changes = {"teacher": node, "teacher_model": None, "teacher_checkpointer": None, "max_steps": 2}
        run("opd", small_config("opd", tiny_base, tmp_path, **changes))
    for row in metrics(tmp_path):
        assert row["teacher_nll_nats"] > 0 and row["grad_norm"] > 0 and "kl_teacher_student_nats" not in row


def test_a_turn_curriculum_is_refused_beside_weights_that_need_every_reward():
    node = {"_component_": "pidistill.objectives.PiDistill", "student_term": "ppo"}
    cfg = OmegaConf.create(
        {"prompts_per_round": 2, "group_size": 2, "turn_curriculum": {"start": 1, "every": 2}, "objective": node}
    )
    assert RoundSizes(cfg).turn_limit(5) == 3
    cfg.objective.student_term = "snis"
    with pytest.raises(InputError, match="student_term=snis weighs every rollout by its reward; remove turn_curriculum"):
        RoundSizes(cfg)


# ------------------------------------------------------------------------------------------- routes and turns


def test_a_run_with_an_objective_for_each_kind_of_row_reports_each_and_refuses_rows_of_no_kind(tiny_base, tmp_path):
    parts = {"0": {"_component_": "pidistill.objectives.OPSDUCLA"}, "1": {"_component_": "pidistill.objectives.GRPO"}}
    objective = {"_component_": "pidistill.objectives.RoutedObjective", "key": "given_calls", "objectives": parts}
    changes = {
        "objective": objective | {"default": "0"},
        "dataset__prefix_turns": [0, 1],
        "dataset__max_rows": 4,
        "max_steps": 2,
        "prompts_per_round": 4,
    }
    run("opsd", small_config("opsd", tiny_base, tmp_path / "run", **changes))
    rows = metrics(tmp_path / "run")
    assert any("loss/0" in row for row in rows) and any("clip_frac/1" in row and "loss/1" in row for row in rows)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    del parts["1"]
    with pytest.raises(InputError, match=r"its given_calls is '1', and objective\.objectives has 0; add that objective"):
        run("opsd", small_config("opsd", tiny_base, tmp_path / "wrong", **changes))


def test_rows_without_information_stay_where_turns_bring_it_and_other_turns_are_not_distilled(tiny_base, tmp_path):
    environment = {
        "_component_": "pidistill.envs.StatePrivileged",
        "text": "tests.support.worlds.second_observation",
        "environment": {"_component_": "tests.support.worlds.VariedEnvironment"},
    }
    changes = {"environment": environment, "dataset__privileged": "none", "objective__no_pi": "drop", "max_steps": 1}
    run("opsd_ucla", small_config("opsd_ucla", tiny_base, tmp_path / "run", **changes))
    (row,) = metrics(tmp_path / "run")
    assert row["rows_without_pi"] > 0 and row["turn_privileged_mean"] > 0 and row["grad_norm"] > 0
    with pytest.raises(InputError, match=r"privileged\.control=none takes .*objective\.no_pi=drop leaves nothing to train"):
        run("opsd_ucla", small_config("opsd_ucla", tiny_base, tmp_path / "none", privileged__control="none", **changes))


@pytest.mark.parametrize("name", ["opsd", "pi_distill"])
def test_information_of_a_turn_reaches_the_teacher_alone(tiny_base, tmp_path, name):
    environment = {
        "_component_": "pidistill.envs.StatePrivileged",
        "text": "tests.support.worlds.second_observation",
        "environment": {"_component_": "tests.support.worlds.VariedEnvironment"},
    }
    rows = {}
    for control in ("length_matched", "none"):
        changes = {"environment": environment, "privileged__control": control, "privileged__filler": "5", "max_steps": 1}
        if name == "pi_distill":
            changes |= {"sampler__max_new_tokens": 24}
        seen = []

        def watch(recipe, seen=seen):
            sample_round = recipe.sample_round

            def watched():
                seen.append(sample_round())
                return seen[-1]

            recipe.sample_round = watched

        run(name, small_config(name, tiny_base, tmp_path / control, **changes), watch)
        rows[control] = metrics(tmp_path / control)[0], seen[0]
    shuffled = small_config(name, tiny_base, tmp_path / "refused", environment=environment, privileged__control="shuffled")
    with pytest.raises(InputError, match=r"environment: .*privileged\.control=shuffled pairs rows, not turns"):
        run(name, shuffled, lambda recipe: pytest.fail("the run began"))
    (shown, rollouts), (plain, others) = rows["length_matched"], rows["none"]
    assert shown["turn_privileged_mean"] > 0 and "turn_privileged_mean" not in plain
    assert any(rollout.teacher_reads for rollout in rollouts)
    for rollout in rollouts:
        for first, last, ids in rollout.teacher_reads:
            assert not any(rollout.policy_mask[first:last]) and len(ids) > last - first
    if name == "opsd":  # the student samples: its rollouts are the same with and without
        assert [r.completion for r in rollouts] == [r.completion for r in others]
        assert shown["student_nll_nats"] == pytest.approx(plain["student_nll_nats"], rel=1e-5)
        assert shown["kl_student_teacher_nats"] > 0
    else:  # ratios to what was sampled are 1: the trainer reads what the sampler read
        assert shown["ratio_mean"] == pytest.approx(1.0, abs=1e-4) and shown["sampler_mismatch_max_nats"] < 1e-4
