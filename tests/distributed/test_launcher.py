"""Test how torchrun ends: with the sentence of a refused run as the last line, and after a signal not before the run."""

import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig
from tqdm import tqdm

from pidistill.distributed import launcher
from pidistill.distributed.launcher import PRINTS_LAST, SHUTDOWN_TIMEOUT, print_refusals, refusal, refuse, wait_for_processes


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


# ------------------------------------------------------------------------------------------- signals

ROUND = """
import signal, sys, time
from pathlib import Path

received = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))
Path("began").touch()
while not received:
    time.sleep(0.05)
for _ in range(60):  # the round is finished, and saved after it
    time.sleep(0.05)
    Path("received").write_text(" ".join(received))
    if received.count("SIGINT") == 2:
        sys.exit(130)
Path("saved").touch()
"""


@pytest.fixture
def launched(tmp_path):
    """A run that `pidistill run` has started with torchrun, in one process, and whose round has begun."""
    (tmp_path / "finish_round.py").write_text(ROUND)
    (tmp_path / "c.yaml").write_text("a: 1\n")
    words = ["run", "--nproc_per_node", "1", "finish_round.py", "--config", "c.yaml"]
    command = [sys.executable, "-m", "pidistill.commands.main", *words]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "began").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    yield run
    run.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_ends_with_one_sentence_and_the_status_of_the_process_that_has_saved(number, launched, tmp_path):
    launched.send_signal(number)
    said = launched.communicate(timeout=60)[1]
    assert launched.returncode == 0 and (tmp_path / "saved").exists()
    assert "Traceback" not in said and said.splitlines()[-1] == f"the run was stopped by {number.name}"


def test_a_second_sigint_reaches_the_process_as_one_and_ends_it_at_once(launched, tmp_path):
    launched.send_signal(signal.SIGINT)
    while not (tmp_path / "received").exists():
        time.sleep(0.05)
    launched.send_signal(signal.SIGINT)
    said = launched.communicate(timeout=60)[1]
    assert launched.returncode == 130 and not (tmp_path / "saved").exists() and "Traceback" not in said
    assert (tmp_path / "received").read_text() == "SIGINT SIGINT"


def test_torchrun_waits_a_day_for_a_round_unless_the_user_says_how_long(monkeypatch):
    monkeypatch.setattr(LocalElasticAgent, "_shutdown", LocalElasticAgent._shutdown)
    monkeypatch.setenv(SHUTDOWN_TIMEOUT, "600")
    wait_for_processes()
    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == 600
    monkeypatch.delenv(SHUTDOWN_TIMEOUT)
    wait_for_processes()
    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == 24 * 60 * 60


def test_under_tune_run_a_signal_is_one_sentence_too(capsys):
    print_refusals()
    error = SignalException("Process 1 got signal: 15", signal.SIGTERM)
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "the run was stopped by SIGTERM\n"
