"""Test that the sentence of a refused run goes into torchrun's error file and is the last line on the screen."""

import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from tqdm import tqdm

from pidistill.distributed import launcher
from pidistill.distributed.launcher import PRINTS_LAST, print_refusals, refusal, refuse


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name in ("TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", PRINTS_LAST):
        monkeypatch.delenv(name, raising=False)


def failure(error_file, rank=0) -> ProcessFailure:
    return ProcessFailure(local_rank=rank, pid=1, exitcode=2, error_file=str(error_file))


def test_without_torchrun_the_sentence_is_printed_once(capsys):
    refuse("lr=fast is\nno \x1b[31mnumber", is_first=True)
    refuse("lr=fast is no number", is_first=False)
    assert capsys.readouterr().err == "error: lr=fast is no \\x1b[31mnumber\n"


def test_the_sentence_stands_in_torchrun_s_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    refuse("lr=fast is no number", is_first=True)
    assert capsys.readouterr().err == "error: lr=fast is no number\n", "no launcher says that it prints it"
    summary = str(ChildFailedError("recipe", {0: failure(tmp_path / "error.json")}))
    assert summary.splitlines()[-2].endswith("error: lr=fast is no number")


def test_the_launcher_prints_the_sentence_of_any_rank_in_place_of_the_traceback(tmp_path, monkeypatch, capsys):
    print_refusals()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    refuse("lr=fast is no number", is_first=True)
    assert capsys.readouterr().err == "", "the launcher prints it"
    error = ChildFailedError("recipe", {0: failure(tmp_path / "absent"), 1: failure(tmp_path / "error.json", 1)})
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "error: lr=fast is no number\n"


def test_any_other_failure_keeps_its_traceback(tmp_path, capsys):
    seen = []
    sys.excepthook = lambda *error: seen.append(error)
    print_refusals()
    print_refusals()
    error = ChildFailedError("recipe", {0: failure(tmp_path / "absent")})
    assert refusal(error) is None and refusal(ValueError("x")) is None
    sys.excepthook(type(error), error, None)
    sys.excepthook(ValueError, ValueError("x"), None)
    assert len(seen) == 2 and capsys.readouterr().err == ""


def test_a_progress_bar_is_ended_before_the_sentence(capsys):
    bar = tqdm(total=3, desc="steps")
    bar.update(1)
    refuse("the data ended", is_first=True)
    lines = capsys.readouterr().err.splitlines()
    assert "steps" in lines[-2] and lines[-1] == "error: the data ended"


def test_torch_loads_the_entry_point_in_the_launching_process_alone(monkeypatch):
    from importlib.metadata import entry_points

    (point,) = [point for point in entry_points(group="torchrun.handlers") if point.name == "pidistill"]
    assert point.load() is launcher.torchrun_handler
    former = sys.excepthook = lambda *error: None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert callable(launcher.torchrun_handler()) and sys.excepthook is former
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert callable(launcher.torchrun_handler()) and sys.excepthook is not former
