"""Test that the programs which an environment starts in a worker end with the worker, whatever ended it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pidistill.envs import EnvironmentCrash, EnvironmentTimeout, ProcessEnvironment
from pidistill.types import Example


class StartsAProgramAndHangs:
    def reset(self, example):
        child = subprocess.Popen(["sleep", "300"])
        Path(example.reference).write_text(str(child.pid))
        time.sleep(300)

    def step(self, state, turn, *, truncated):
        raise AssertionError


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class StartsAProgramAndDies(StartsAProgramAndHangs):
    def reset(self, example):
        child = subprocess.Popen(["sleep", "300"])
        Path(example.reference).write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGSEGV)


class ForksAndDies(StartsAProgramAndHangs):
    def reset(self, example):
        child = os.fork()
        if child == 0:
            time.sleep(300)
        Path(example.reference).write_text(str(child))
        os._exit(7)


def row(path):
    return Example(id="row 0", messages=[{"role": "user", "content": "q"}], reference=str(path))


def assert_ends(pid, seconds=10):
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def test_the_programs_of_a_hung_worker_end_with_it(tmp_path):
    environment = ProcessEnvironment(StartsAProgramAndHangs(), workers=1, timeout_s=3.0)
    with pytest.raises(EnvironmentTimeout):
        environment.reset(row(tmp_path / "pid"))
    assert_ends(int((tmp_path / "pid").read_text()))


def test_the_programs_of_a_worker_that_crashes_end_with_it(tmp_path):
    environment = ProcessEnvironment(StartsAProgramAndDies(), workers=1, timeout_s=30.0)
    with pytest.raises(EnvironmentCrash, match="SIGSEGV"):
        environment.reset(row(tmp_path / "pid"))
    assert_ends(int((tmp_path / "pid").read_text()))


def test_a_forked_child_of_a_worker_that_dies_ends_with_it(tmp_path):
    environment = ProcessEnvironment(ForksAndDies(), workers=1, timeout_s=None)
    with pytest.raises(EnvironmentCrash, match="exit code 7"):
        environment.reset(row(tmp_path / "pid"))
    assert_ends(int((tmp_path / "pid").read_text()))


PARENT = """
import sys
from pidistill.envs import ProcessEnvironment
from tests.envs.test_process_groups import StartsAProgramAndHangs, row
if __name__ == "__main__":
    ProcessEnvironment(StartsAProgramAndHangs(), workers=1, timeout_s=None).reset(row(sys.argv[1]))
"""


def test_the_programs_of_a_worker_end_with_the_run_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    root = Path(__file__).parents[2]
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "pid")]
    parent = subprocess.Popen(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    try:
        deadline = time.monotonic() + 120
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    assert_ends(int((tmp_path / "pid").read_text()))
