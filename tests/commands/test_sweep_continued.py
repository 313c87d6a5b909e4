"""Test that a sweep which another command continues keeps what was measured, and says what is different."""

import json
from pathlib import Path

import pytest

from pidistill.commands.sweep import check, command, execute
from pidistill.commands.sweep.results import read_results
from tests.support.sweeps import overrides_of

EVALUATE = ("--evaluate", "tiny/evaluate")
SUCCESS = {"step_2": 0.75, "step_4": 0.25}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the sweep of one cell; return its row, the number of runs that were started, and what was printed.

    A run leaves two checkpoints, of which the first is better, and an evaluation their success.
    """
    started = []

    def execute_run(words, log, lock):
        started.append(words)
        overrides = overrides_of(words)
        folder = Path(overrides["output_dir"])
        if words[4].startswith("evaluate"):
            success = SUCCESS[Path(overrides["checkpointer.checkpoint_dir"]).resolve().name]
            (folder / "results.json").write_text(json.dumps({"student": {"success": success}}))
            return 0
        rows = [{"step": step, "loss": 1.0, "eval_student_success": SUCCESS[f"step_{step}"]} for step in (2, 4)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row | {"policy_tokens": 8}) + "\n" for row in rows))
        for name in SUCCESS:
            (folder / name).mkdir()
        (folder / "latest").symlink_to("step_4")
        return 0

    def start(*words):
        before = len(started)
        command.main(["tiny/opsd", "seed=0", *words, "--output-dir", str(tmp_path / "out")])
        (row,) = read_results(tmp_path / "out").values()
        return row, len(started) - before, capsys.readouterr().out

    monkeypatch.setattr(execute, "execute", execute_run)
    monkeypatch.setattr(command, "draw", lambda output_dir, rows: [])
    monkeypatch.setattr(check, "check_checkpoint_folder", lambda cfg, key: None)
    return start


def test_a_sweep_that_is_continued_without_an_evaluation_keeps_its_held_out_numbers(run, tmp_path):
    first, _, _ = run(*EVALUATE)
    assert first["last"]["student_success"] == 0.25 and first["best"]["student_success"] == 0.75
    second, started, said = run()
    assert started == 0 and (second["last"], second["best"]) == (first["last"], first["best"])
    assert "opsd,seed=0: it was evaluated, and this command has no --evaluate; its runs and their numbers are kept" in said
    assert "has changed" not in said and "0.250" in (tmp_path / "out" / "results.md").read_text()
    third, started, said = run()
    assert started == 0 and third == second and "1 of them finished before" in said
    last, started, _ = run(*EVALUATE)
    assert started == 0 and last == first


def test_a_cell_that_is_selected_by_another_metric_keeps_its_runs_and_their_last_numbers_and_says_so(run):
    first, _, _ = run(*EVALUATE)
    second, started, said = run("--select", "loss")
    assert started == 0 and second["last"] == first["last"] and "best" not in second
    assert "it was selected by eval_student_success, and now by loss; its runs are kept" in said


def test_an_evaluation_that_is_added_says_so_and_trains_nothing_again(run):
    run()
    row, started, said = run(*EVALUATE)
    assert started == 2 and row["last"]["student_success"] == 0.25
    assert "its evaluation is new or has changed since it was finished; its runs are kept and evaluated" in said


def test_numbers_of_runs_that_were_made_again_are_not_kept(run, tmp_path):
    run(*EVALUATE)
    (record,) = (tmp_path / "out" / "runs").glob("*/sweep.json")
    record.write_text(record.read_text().replace('"fingerprint": "', '"fingerprint": "x'))
    row, started, said = run()
    assert started == 1 and "last" not in row
    assert "its config has changed since it was finished; it is run again" in said
