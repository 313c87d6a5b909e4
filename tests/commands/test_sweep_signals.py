"""Test that a sweep that is told to end also ends what it has started."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

RUN = """\
#!{shell}
trap 'echo ended >> {folder}/events; exit 0' TERM
echo started >> {folder}/events
while true; do sleep 0.05; done
"""
WORK = """
import sys
from pathlib import Path
from pidistill.commands.sweep import execute, search

folder = Path({folder!r})

def work():
    sys.executable = str(folder / "run.sh")  # in place of `pidistill run`
    with execute.sigterm_raises():
        execute.execute(["pidistill", "run"], folder / "log.txt", execute.try_lock(folder, "a").fileno())

if __name__ == "__main__":
    {call}
"""


def events(folder: Path) -> list[str]:
    return (folder / "events").read_text().split() if (folder / "events").exists() else []


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
@pytest.mark.parametrize("call", ["work()", "search.run_processes(work, (), 1)"], ids=["in this process", "in a worker"])
def test_a_signal_ends_the_run_before_the_sweep_ends(call, number, code, tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(RUN.format(shell="/bin/sh", folder=tmp_path))
    script.chmod(0o755)
    (tmp_path / "sweep.py").write_text(textwrap.dedent(WORK).format(folder=str(tmp_path), call=call))
    sweep = subprocess.Popen([sys.executable, str(tmp_path / "sweep.py")], stderr=subprocess.PIPE, text=True)
    try:
        while "started" not in events(tmp_path):
            assert sweep.poll() is None, sweep.stderr.read()
            time.sleep(0.05)
        sweep.send_signal(number)
        assert sweep.wait(timeout=60) == code
        assert events(tmp_path) == ["started", "ended"]
    finally:
        sweep.kill()
