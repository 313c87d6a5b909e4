"""Test the folder of a run: nothing in it is overwritten, two runs do not share it, and no secret is written into it."""

import json
import os
import signal
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from pidistill.errors import InputError
from pidistill.training import interrupts, run_folder
from pidistill.training.interrupts import Stopped, handle_signals, received_signal, training_begins, training_run
from pidistill.training.run_folder import (
    EVALUATION_FILES,
    SAMPLING_FILES,
    STATE_FILE,
    claim_run_folder,
    holds_run,
    lock_folder,
    newest_checkpoint,
    public_config,
    record_config,
    set_results_aside,
)
from pidistill.training.start import one_sentence_errors

LOCKS = "import sys, pathlib; from pidistill.training.run_folder import lock_folder; lock_folder(pathlib.Path(sys.argv[1]));"


@pytest.fixture(autouse=True)
def own_locks(monkeypatch):
    monkeypatch.setattr(run_folder, "_locks", {})


@pytest.fixture
def used(tmp_path):
    folder = tmp_path / "run"
    (folder / "step_4").mkdir(parents=True)
    (folder / "step_4" / STATE_FILE).write_text("state")
    (folder / "latest").symlink_to("step_4")
    (folder / "metrics.jsonl").write_text('{"step": 4}\n')
    (folder / "config.yaml").write_text("seed: 1\noptimizer: {lr: 0.1}\n")
    return folder


def claim(folder, value, **more):
    claim_run_folder(OmegaConf.create({"resume_from_checkpoint": value, **more}), folder)


def test_a_new_run_is_refused_where_a_run_is_and_the_ways_out_are_named(used):
    before = {path.name for path in used.iterdir()}
    with pytest.raises(
        InputError, match=r"holds a run \(newest checkpoint step_4\).*resume_from_checkpoint=true .*=start_over"
    ):
        claim(used, False)
    assert {path.name for path in used.iterdir()} - {".lock"} == before


@pytest.mark.parametrize("trace", ["latest", "step_4", "metrics.jsonl"])
def test_one_trace_of_a_run_is_enough(trace, used, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    os.rename(used / trace, alone / trace)
    assert holds_run(alone)


def test_a_config_alone_is_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "metrics.jsonl").touch()
    assert not holds_run(tmp_path)
    claim(tmp_path, False)


def test_start_over_moves_the_files_aside_each_time_into_a_new_folder(used):
    for number in (1, 2):
        claim(used, "start_over")
        assert not holds_run(used)
        assert (used / f"previous_{number}" / "metrics.jsonl").is_file()
        (used / "metrics.jsonl").write_text('{"step": 1}\n')
    assert (used / "previous_1" / "latest" / STATE_FILE).read_text() == "state"


def test_start_over_does_not_move_the_checkpoint_that_it_starts_from(used):
    with pytest.raises(InputError, match=r"checkpointer.checkpoint_dir=.*step_4 lies in .*step_4, which .*start_over moves"):
        claim(used, "start_over", checkpointer={"checkpoint_dir": str(used / "step_4")})
    assert (used / "step_4" / STATE_FILE).is_file()


def results_of(folder, weights, **settings):
    """Write what an evaluation leaves; ``weights`` as its record names them, None without a record."""
    for name in EVALUATION_FILES[:3]:
        (folder / name).write_text("{}")
    if weights is not None:
        (folder / "checkpoint.json").write_text(json.dumps({"weights": weights}))
    record_config(OmegaConf.create(settings), folder)


def test_results_of_another_config_or_checkpoint_move_aside_and_those_of_the_same_ones_stay(tmp_path, caplog):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_2").mkdir()
    (tmp_path / "latest").symlink_to("step_1")
    folder = tmp_path / "test"
    folder.mkdir()
    same = {"seed": 1, "checkpointer": {"checkpoint_dir": str(tmp_path / "latest")}}
    results_of(folder, "../step_1", **same)
    set_results_aside(OmegaConf.create(same), folder, EVALUATION_FILES)
    assert len(list(folder.iterdir())) == 5 and not caplog.records
    for number, (weights, settings) in enumerate([("../step_1", same | {"seed": 2}), ("../step_2", same), (None, same)], 1):
        results_of(folder, weights, **settings)
        set_results_aside(OmegaConf.create(same), folder, EVALUATION_FILES)
        aside = folder / f"previous_{number}"
        names = {*EVALUATION_FILES[: 3 if weights is None else 4], "config.yaml"}
        assert {path.name for path in aside.iterdir()} == names
        assert {path.name for path in folder.iterdir()} <= {f"previous_{n}" for n in range(1, number + 1)} | {"checkpoint.json"}
        assert f"another checkpoint or config; its {len(names)} files were moved to {aside}" in caplog.messages[-1]
        if weights is not None:
            assert (aside / json.loads((aside / "checkpoint.json").read_text())["weights"]).is_dir()
    set_results_aside(OmegaConf.create(same), folder, EVALUATION_FILES)
    assert len(caplog.records) == 3, "there are no results, and nothing to move"


def test_a_sampling_moves_its_traces_aside_and_leaves_an_evaluations_files(tmp_path):
    (tmp_path / "latest").symlink_to(tmp_path)
    settings = {"seed": 1, "checkpointer": {"checkpoint_dir": str(tmp_path / "latest")}}
    results_of(tmp_path, None, **settings)
    for name in SAMPLING_FILES:
        (tmp_path / name).write_text("{}\n")
    set_results_aside(OmegaConf.create(settings), tmp_path, SAMPLING_FILES)
    assert not (tmp_path / "previous_1").exists(), "the same config and folder"
    set_results_aside(OmegaConf.create(settings | {"seed": 2}), tmp_path, SAMPLING_FILES)
    assert {path.name for path in (tmp_path / "previous_1").iterdir()} == {*SAMPLING_FILES, "config.yaml"}
    assert {path.name for path in tmp_path.iterdir()} == {*EVALUATION_FILES[:3], "previous_1", "latest"}


@pytest.mark.parametrize("value", [True, "auto"])
def test_a_resume_leaves_the_files_and_says_what_changed(value, used, monkeypatch):
    said = []
    monkeypatch.setattr(run_folder, "log", type("Log", (), {"warning": staticmethod(said.append)}))
    claim(used, value, seed=1, optimizer={"lr": 0.2})
    assert holds_run(used)
    assert len(said) == 1 and "optimizer.lr: 0.1 -> 0.2" in said[0] and "seed" not in said[0]


def test_a_value_of_resume_from_checkpoint_that_is_not_one_of_four_is_refused(tmp_path):
    with pytest.raises(InputError, match="resume_from_checkpoint=yes is not one of false, true, auto, start_over"):
        claim(tmp_path, "yes")


def test_the_newest_step_is_the_one_with_the_highest_number(used):
    (used / "latest").unlink()
    for name in ("step_10", "step_9", "step_notes"):
        (used / name).mkdir()
        (used / name / STATE_FILE).touch()
    (used / "step_11").mkdir()  # no training state
    assert newest_checkpoint(used).name == "step_10"


def test_a_second_process_is_refused_and_a_kill_of_the_first_frees_the_folder_though_its_child_lives(tmp_path):
    child = "import subprocess; subprocess.Popen(['sleep', '30']);"
    hold = f"{LOCKS} {child} print('locked', flush=True); import time; time.sleep(60)"
    first = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    group = first.pid
    try:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=rf"is in use by another run \(process {first.pid}\)"):
            lock_folder(tmp_path)
        first.kill()
        first.wait()
        lock_folder(tmp_path)
    finally:
        os.killpg(group, signal.SIGKILL)


# ------------------------------------------------------------------------------------------- secrets


def test_values_from_the_environment_are_not_written_out(monkeypatch):
    monkeypatch.setenv("API_KEY", "hunter2")
    cfg = OmegaConf.create(
        {
            "key": "${oc.env:API_KEY}",
            "judge": {"key": "${key}", "header": "Bearer ${judge.key}", "names": ["${oc.env:API_KEY,none}", "x"]},
            "copy": "${judge}",
            "model": "qwen",
            "path": "runs/${model}",
        }
    )
    public = public_config(cfg)
    assert "hunter2" not in str(public)
    assert public["path"] == "runs/qwen"
    assert public["judge"]["names"] == ["${oc.env:API_KEY,none}", "x"]
    assert OmegaConf.create(public).judge.header == "Bearer hunter2"  # who has the variable can run the saved config


# ------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_round_once_training_began_and_ends_at_once_before(signum, code):
    before = signal.getsignal(signum)
    with handle_signals():
        training_run()
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signum)
        assert stopped.value.code == code
        training_begins()
        signal.raise_signal(signum)
        assert received_signal() == signum
    assert signal.getsignal(signum) is before and received_signal() == 0


def test_a_second_sigint_ends_at_once_and_torchruns_sigterm_after_it_does_not():
    with handle_signals():
        training_run()
        training_begins()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="130"):
            signal.raise_signal(signal.SIGINT)


def test_a_recipe_that_saves_nothing_does_not_end_as_if_it_were_done(capsys):
    def recipe(cfg):
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        one_sentence_errors(recipe)(OmegaConf.create({}))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "SIGTERM: stopped before the end; nothing is saved" in capsys.readouterr().err
    assert interrupts.received_signal() == 0
