import subprocess
import time
from pathlib import Path

import pytest

from pidistill.envs import EnvironmentTimeout, ProcessEnvironment
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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_the_programs_of_a_hung_worker_end_with_it(tmp_path):
    written = tmp_path / "pid"
    environment = ProcessEnvironment(StartsAProgramAndHangs(), workers=1, timeout_s=3.0)
    with pytest.raises(EnvironmentTimeout):
        environment.reset(Example(id="row 0", messages=[{"role": "user", "content": "q"}], reference=str(written)))
    deadline = time.monotonic() + 5
    while is_running(int(written.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(written.read_text()))
