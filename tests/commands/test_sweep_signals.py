"""Test that a sweep that is told to end also ends what it has started."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pidistill.commands import main as entry
from pidistill.commands.sweep import command

RUN = """\
#!{shell}
trap 'echo ended >> {folder}/events; exit 0' TERM
echo started >> {folder}/events
while true; do sleep 0.05; done
"""
WORK = """
import os
import sys
from pathlib import Path
from pidistill.commands.sweep import execute, search

folder = Path({folder!r})

def work():
    sys.executable = str(folder / "run.sh")  # in place of `pidistill run`
    with execute.sigterm_raises():
        execute.execute(["pidistill", "run"], folder / "log.txt", execute.try_lock(folder, str(os.getpid())).fileno())

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


def test_a_terminals_sigint_ends_workers_without_a_traceback_and_after_their_runs(tmp_path):
    script = tmp_path / "run.sh"
    slow = RUN.replace("; exit 0", "; sleep 1; echo saved >> {folder}/events; exit 0").replace("trap", "trap '' INT\ntrap", 1)
    script.write_text(slow.format(shell="/bin/sh", folder=tmp_path))
    script.chmod(0o755)
    call = "try: search.run_processes(work, (), 2)\n    except KeyboardInterrupt: sys.exit(130)"
    (tmp_path / "sweep.py").write_text(textwrap.dedent(WORK).format(folder=str(tmp_path), call=call))
    command = [sys.executable, str(tmp_path / "sweep.py")]
    sweep = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while events(tmp_path).count("started") < 2:
            assert sweep.poll() is None, sweep.stderr.read()
            time.sleep(0.05)
        os.killpg(sweep.pid, signal.SIGINT)
        said = sweep.communicate(timeout=60)[1]
        assert sweep.returncode == 130 and "Traceback" not in said
        assert sorted(events(tmp_path)) == ["ended", "ended", "saved", "saved", "started", "started"]
    finally:
        sweep.kill()


def test_a_command_that_sigint_ends_says_nothing_and_has_status_130(monkeypatch, capsys):
    def end(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "main", end)
    monkeypatch.setattr("sys.argv", ["pidistill", "sweep", "tiny/opsd"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130 and capsys.readouterr().err == ""
