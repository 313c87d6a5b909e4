"""Test that a run which was killed and resumed leaves the rows and, to the bit, the weights of an uninterrupted one."""

import json
import os
import shutil
import signal

import pytest
import torch
from omegaconf import OmegaConf

from pidistill.errors import InputError
from pidistill.training import checkpoints
from tests.support import runs
from tests.support.forks import Fork, shared_server
from tests.support.runs import (
    EMA,
    RECIPES,
    TINY,
    Stop,
    assert_same_tensors,
    metrics,
    run,
    save_config,
    small_config,
    stop_after_row,
    training_state,
    wait_for_row_after_checkpoint,
    weights,
)

EVALUATION = {"eval_dataset": runs.EVALUATION["eval_dataset"] | {"max_rows": 1}}
ROUNDS = {"max_steps": 7, "save_every_steps": 2, "eval_every_steps": 3, "eval_samples": 2, "rollout_log_steps": 2, **EVALUATION}
METHODS = {
    # Two updates per round, each on one of its two groups; three does not divide into rounds, so 4 and 6 are saved.
    "pi_distill": ROUNDS | {"save_every_steps": 3, "updates_per_round": 2, "minibatch_rollouts": 3},
    # Rewards with noise from a random stream of the process, which a checkpoint therefore holds.
    "opsd": ROUNDS | {"teacher": EMA, "environment__noise": 0.5},
    "sft": {"max_steps": 7, "save_every_steps": 2, "eval_every_steps": 3, **EVALUATION},
}
SAVED = {"pi_distill": [4, 6, 7], "opsd": [2, 4, 6, 7], "sft": [2, 4, 6, 7]}


@pytest.fixture(scope="module")
def uninterrupted(tiny_base, tmp_path_factory):
    """method → the folder of a whole run."""
    folders = {}

    def folder(method):
        if method not in folders:
            folders[method] = tmp_path_factory.mktemp(method)
            run(method, small_config(method, tiny_base, folders[method], **METHODS[method]))
        return folders[method]

    return folder


def assert_same_run(folder, whole):
    assert metrics(folder) == metrics(whole)
    assert_same_tensors(weights(folder), weights(whole))
    assert_same_tensors(training_state(folder), training_state(whole))
    texts = [path / "rollouts.jsonl" for path in (folder, whole)]
    assert texts[0].exists() == texts[1].exists()
    assert not texts[0].exists() or texts[0].read_text() == texts[1].read_text()


def resume(method, base, folder, **changes):
    return run(method, small_config(method, base, folder, **METHODS[method] | changes, resume_from_checkpoint=True))


def test_an_uninterrupted_run_has_one_row_per_step_and_evaluation(uninterrupted):
    for method in METHODS:
        rows = metrics(uninterrupted(method))
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, 8)), method
        evaluated = [row["step"] for row in rows if "eval_student_success" in row]
        assert evaluated == ([0, 4, 6, 7] if method == "pi_distill" else [0, 3, 6, 7]), method
        assert all("loss" in row or "eval_student_success" in row for row in rows)
        changed = [
            not torch.equal(a, b) for a, b in zip(*map(dict.values, ends_of(uninterrupted(method), method)), strict=True)
        ]
        assert all(changed), method  # every weight trains, so equal weights below say something


def ends_of(folder, method):
    return weights(folder, f"step_{SAVED[method][0]}"), weights(folder)


def test_checkpoints_fall_on_the_ends_of_rounds(uninterrupted):
    for method, steps in SAVED.items():
        folder = uninterrupted(method)
        assert sorted(int(path.name[5:]) for path in folder.glob("step_*")) == steps
        assert (folder / "latest").resolve() == folder / "step_7"
        assert [training_state(folder, f"step_{step}")["step"] for step in steps] == steps


OTHER_STOP = pytest.mark.slow(reason="pi_distill is stopped at all three places, and each method at one of them")


@pytest.mark.parametrize(
    ("method", "stop"),
    [("pi_distill", 5), ("pi_distill", 6), ("pi_distill", 7), ("opsd", 6), ("sft", 7)]
    + [pytest.param(*case, marks=OTHER_STOP) for case in [("opsd", 5), ("opsd", 7), ("sft", 5), ("sft", 6)]],
)
def test_a_stopped_run_resumes_exactly(method, stop, tiny_base, tmp_path, uninterrupted):
    """Stop it in the middle of a round, at the end of a round before the checkpoint is written, and before the last one."""
    run(method, small_config(method, tiny_base, tmp_path, **METHODS[method]), stop_after_row(stop))
    assert training_state(tmp_path)["step"] == max(step for step in SAVED[method] if step < stop)
    resume(method, tiny_base, tmp_path)
    assert_same_run(tmp_path, uninterrupted(method))


def test_a_run_from_random_weights_resumes_exactly_and_its_checkpoint_is_evaluated(tmp_path):
    """configs/tiny/base.yaml starts from `pidistill.models.from_scratch`, whose files have other names than a saved step's."""
    steps = {"max_steps": 3, "dataset__n": 12, "save_every_steps": 1}
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    run("base", small_config("base", tmp_path, whole, **steps))
    run("base", small_config("base", tmp_path, halved, **steps), stop_after_row(3))
    assert training_state(halved)["step"] == 2
    run("base", small_config("base", tmp_path, halved, **steps, resume_from_checkpoint=True))
    assert_same_run(halved, whole)

    scratch = small_config("base", tmp_path, halved).checkpointer | {"checkpoint_dir": str(halved / "latest")}
    scratch["model"] = {**OmegaConf.load(TINY / "base.yaml").model, **{k.partition(".")[2]: v for k, v in runs.MODEL.items()}}
    evaluated = small_config("evaluate", tmp_path, halved / "test", checkpointer=scratch, dataset__max_rows=2)
    model = run("evaluate", evaluated)._model
    assert torch.equal(model.state_dict()["norm.scale"], weights(halved)["model.norm.weight"])


@pytest.mark.parametrize("wrong", ["objective", "must_match", "checkpoint", "objective's argument"])
def test_a_resume_that_is_refused_leaves_the_config_of_the_saved_weights(wrong, tiny_base, tmp_path):
    run("opsd", small_config("opsd", tiny_base, tmp_path, max_steps=1))
    before = (tmp_path / "config.yaml").read_text()
    changes = {
        "objective": {"objective": {"_component_": "pidistill.objectives.PCSD"}},
        "must_match": {"group_size": 2},
        "checkpoint": {"objective__beta": 0.7},
        "objective's argument": {"objective__clip_low": 1.5},
    }[wrong]
    if wrong == "checkpoint":
        (file,) = (tmp_path / "step_1").glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError):
        run("opsd", small_config("opsd", tiny_base, tmp_path, max_steps=2, resume_from_checkpoint=True, **changes))
    assert (tmp_path / "config.yaml").read_text() == before


@pytest.mark.parametrize("value", [True, "auto"])
def test_a_resume_that_trains_writes_its_config(value, tiny_base, tmp_path):
    run("opsd", small_config("opsd", tiny_base, tmp_path, max_steps=1))
    changes = {"objective__beta": 0.7, "resume_from_checkpoint": value}
    run("opsd", small_config("opsd", tiny_base, tmp_path, max_steps=2, **changes))
    written = OmegaConf.load(tmp_path / "config.yaml")
    assert (written.max_steps, written.objective.beta) == (2, 0.7)


def test_half_a_line_at_the_end_is_cut_off(tiny_base, tmp_path, uninterrupted):
    run("opsd", small_config("opsd", tiny_base, tmp_path, **METHODS["opsd"]), stop_after_row(5))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 6, "loss": 0.2')
    resume("opsd", tiny_base, tmp_path)
    assert_same_run(tmp_path, uninterrupted("opsd"))


@pytest.mark.parametrize("where", ["before its weights", "before its state", "before it is moved", "before latest moves"])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(where, tiny_base, tmp_path, monkeypatch, uninterrupted):
    """The second save is cut short."""
    method = "opsd" if where == "before its state" else "sft"  # a teacher is part of the state
    with monkeypatch.context() as patch:
        if where == "before its weights":  # without a teacher, it is called once per save
            patch.setattr(checkpoints.Checkpoints, "_full", stop_at_second(checkpoints.Checkpoints._full))
        elif where == "before its state":
            state = stop_at_second(torch.save, lambda _, path: getattr(path, "name", "") == checkpoints.STATE_FILE)
            patch.setattr(checkpoints.torch, "save", state)
        else:
            moved = "epoch_0" if where == "before it is moved" else ".latest"
            patch.setattr(checkpoints.os, "replace", stop_at_second(os.replace, lambda path, _: path.name == moved))
        run(method, small_config(method, tiny_base, tmp_path, **METHODS[method]))
    assert training_state(tmp_path)["step"] == 2
    resume(method, tiny_base, tmp_path)
    assert_same_run(tmp_path, uninterrupted(method))


def stop_at_second(original, counts=lambda *arguments: True):
    """``original``, except that its second call that counts ends the run instead."""
    calls = []

    def call(*arguments, **keywords):
        if counts(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise Stop
        return original(*arguments, **keywords)

    return call


def test_resuming_a_finished_run_changes_nothing(tiny_base, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted("opsd"), tmp_path / "copy", symlinks=True)
    resume("opsd", tiny_base, tmp_path / "copy")
    assert_same_run(tmp_path / "copy", uninterrupted("opsd"))


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_process_resumes_exactly(method, tiny_base, tmp_path, uninterrupted):
    """Send SIGKILL at whatever point the run has reached when the first row after a checkpoint appears."""
    # Supervised steps play no episodes: evaluating after each makes them slow enough to be killed.
    more = {"eval_every_steps": 1} if method == "sft" else {}
    slow = METHODS[method] | more | {"environment__wait_s": 0.03}
    config = save_config(small_config(method, tiny_base, tmp_path / "run", **slow), tmp_path / "config.yaml")
    process = Fork(shared_server(), RECIPES[method], ["--config", str(config)], tmp_path / "log")
    try:
        wait_for_row_after_checkpoint(tmp_path / "run")
    finally:
        process.send(signal.SIGKILL)
        status = process.wait()
    assert status == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    assert training_state(tmp_path / "run")["step"] < 7, "the run was over before it was killed"
    resume(method, tiny_base, tmp_path / "run", **more)
    if more:
        rows = [row for row in metrics(tmp_path / "run") if "loss" in row or row["step"] in (0, 3, 6, 7)]
        assert len(rows) < len(metrics(tmp_path / "run"))
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_same_run(tmp_path / "run", uninterrupted(method))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_loses_no_step(signum, code, tiny_base, tmp_path, uninterrupted):
    slow = METHODS["opsd"] | {"environment__wait_s": 0.03}
    config = save_config(small_config("opsd", tiny_base, tmp_path / "run", **slow), tmp_path / "config.yaml")
    process = Fork(shared_server(), RECIPES["opsd"], ["--config", str(config)], tmp_path / "log")
    try:
        wait_for_row_after_checkpoint(tmp_path / "run")
    finally:
        process.send(signum)
        status = process.wait()
    text = (tmp_path / "log").read_text()
    assert status == code, text[-2000:]
    assert "Traceback" not in text
    step = metrics(tmp_path / "run")[-1]["step"]
    assert step < 7 and f"stopped after step {step}, which is saved; set resume_from_checkpoint=true to continue" in text
    assert training_state(tmp_path / "run")["step"] == step
    resume("opsd", tiny_base, tmp_path / "run")
    # The step at which the signal came is saved besides; all else is equal.
    assert_same_run(tmp_path / "run", uninterrupted("opsd"))


# ------------------------------------------------------------------------------------------- what cannot be resumed


def test_resume_without_a_checkpoint_is_refused(tiny_base, tmp_path):
    with pytest.raises(InputError, match=r"resume_from_checkpoint=True but .*latest holds no training_state.pt"):
        resume("opsd", tiny_base, tmp_path)


def test_the_checkpoint_of_another_objective_is_refused(tiny_base, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted("opsd"), tmp_path / "copy", symlinks=True)
    other = small_config("rl", tiny_base, tmp_path / "copy", resume_from_checkpoint=True)
    with pytest.raises(
        InputError, match=r"was trained with pidistill.objectives.OPSD, this config says pidistill.objectives.GRPO"
    ):
        run("rl", other)


@pytest.mark.parametrize("key", ["teacher", "lr_scheduler"])
def test_a_checkpoint_that_lacks_a_needed_state_is_refused(key, tiny_base, tmp_path, uninterrupted):
    """Silently starting an average or a schedule anew would be another run."""
    shutil.copytree(uninterrupted("opsd"), tmp_path / "copy", symlinks=True)
    state = torch.load(tmp_path / "copy" / "latest" / checkpoints.STATE_FILE, weights_only=True)
    state["teacher" if key == "teacher" else "scheduler"] = {} if key == "teacher" else None
    torch.save(state, tmp_path / "copy" / "latest" / checkpoints.STATE_FILE)
    with pytest.raises(InputError, match=f"lacks a state of `{key}` and this config needs it"):
        resume("opsd", tiny_base, tmp_path / "copy")


def test_a_checkpoint_with_a_state_that_nothing_takes_is_refused(tiny_base, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted("opsd"), tmp_path / "copy", symlinks=True)
    with pytest.raises(InputError, match="has a state of `teacher` and this config has no use for it"):
        resume("opsd", tiny_base, tmp_path / "copy", teacher={"_component_": "pidistill.teachers.FrozenTeacher"})


@pytest.mark.parametrize("value", [True, "auto"])
def test_a_run_killed_before_its_first_checkpoint_starts_over(value, tiny_base, tmp_path, uninterrupted):
    run("opsd", small_config("opsd", tiny_base, tmp_path, **METHODS["opsd"]), stop_after_row(1))
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1]
    run("opsd", small_config("opsd", tiny_base, tmp_path, **METHODS["opsd"], resume_from_checkpoint=value))
    assert_same_run(tmp_path, uninterrupted("opsd"))


def test_a_new_run_leaves_a_folder_that_holds_a_run_as_it_is(tiny_base, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted("opsd"), tmp_path / "copy", symlinks=True)
    with pytest.raises(InputError, match=r"holds a run \(newest checkpoint step_7\), which a new one would overwrite"):
        run("opsd", small_config("opsd", tiny_base, tmp_path / "copy", **METHODS["opsd"]))
    assert_same_run(tmp_path / "copy", uninterrupted("opsd"))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"prompts_per_round": 3}, {"group_size": 2}, {"dataset__max_rows": 40}])
def test_a_run_with_another_order_of_the_data_is_refused(changes, tiny_base, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted("opsd"), tmp_path / "copy", symlinks=True)
    with pytest.raises(InputError, match=r"was trained with \w+=\d+, this run has \d+; the order of the data would differ"):
        resume("opsd", tiny_base, tmp_path / "copy", **changes)


def test_rows_of_the_same_number_with_another_content_are_warned_of(tiny_base, tmp_path, uninterrupted, caplog):
    shutil.copytree(uninterrupted("opsd"), tmp_path / "copy", symlinks=True)
    resume("opsd", tiny_base, tmp_path / "copy")
    assert "another content or order" not in caplog.text
    resume("opsd", tiny_base, tmp_path / "copy", dataset__world_seed=77)
    assert "rows of `dataset` have another content or order than when step_7 was saved" in caplog.text


def test_a_longer_run_continues_a_finished_one_as_if_it_had_been_longer(tiny_base, tmp_path, uninterrupted):
    run("opsd", small_config("opsd", tiny_base, tmp_path, **METHODS["opsd"] | {"max_steps": 3, "eval_every_steps": 3}))
    resume("opsd", tiny_base, tmp_path)
    assert_same_run(tmp_path, uninterrupted("opsd"))


def test_a_run_that_ended_inside_a_round_is_not_continued(tiny_base, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted("pi_distill"), tmp_path / "copy", symlinks=True)
    with pytest.raises(InputError, match="the checkpoint at step 7 ended inside a round of 2 updates"):
        resume("pi_distill", tiny_base, tmp_path / "copy", max_steps=8)
