"""Run many `pidistill` commands quickly: each in a fork of a process that has imported everything.

The program reads one JSON object a line, {"words": [...], "cwd": folder}, and answers each with one line
{"outcome", "exit_status", "output", "seconds"}. A command has limits of time and of memory.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.support.runs import ROOT, environment

LIMIT_S = 30
LIMIT_BYTES = 3 * 2**30  # of memory that a command takes beyond what is imported


def outcome(status: int | None, output: str) -> str:
    """Return how a command ended; ``status`` is None where the time limit ended it, and negative after a signal."""
    if status is None:
        return "hang"
    if status < 0:
        return "crash"
    if "Traceback (most recent call last)" in output:
        return "traceback"
    if status == 0:
        return "accepted"
    lines = [line for line in re.split(r"[\n\r]", output) if line.strip()]
    sentences = [line for line in lines if line.startswith("error: ")]
    return "refused with one sentence" if sentences and len(sentences) == 1 and lines[-1] == sentences[0] else "other"


def run_all(commands: Iterable[tuple[list[str], Path]]) -> Iterator[dict[str, Any]]:
    """Yield the answers to commands, each with its folder, in order."""
    program = [sys.executable, "-m", "tests.trials.warm"]
    with subprocess.Popen(
        program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(PYTHONPATH=str(ROOT))
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        for words, folder in commands:
            server.stdin.write(json.dumps({"words": words, "cwd": str(folder)}) + "\n")
            server.stdin.flush()
            yield json.loads(server.stdout.readline())
        server.stdin.close()


# ------------------------------------------------------------------------------------------- the program


def main() -> None:
    _import_everything()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(_try(**json.loads(line))) + "\n")
        answers.flush()


def _import_everything() -> None:
    import datasets  # noqa: F401
    import rich.console  # noqa: F401
    import torchtune._cli.tune  # noqa: F401

    import pidistill
    from pidistill.envs.tiny_world import dataset
    from pidistill.envs.tiny_world.world import World, make_split

    with contextlib.redirect_stdout(sys.stderr):
        for module in pkgutil.walk_packages(pidistill.__path__, "pidistill."):
            if "vllm" not in module.name:
                with contextlib.suppress(ImportError):
                    importlib.import_module(module.name)
    splits = functools.cache(lambda seed: make_split(World(seed)))
    dataset.make_split = lambda world: splits(world.seed)
    splits(dataset.WORLD_SEED if hasattr(dataset, "WORLD_SEED") else 1234)
    gc.collect()
    gc.freeze()


def _try(words: list[str], cwd: str) -> dict[str, Any]:
    begin = time.monotonic()
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            _run(words, cwd, file.fileno())
        status = _wait(child, begin + LIMIT_S)
        file.seek(0)
        output = file.read().decode("utf-8", errors="replace")
    ended = {"outcome": outcome(status, output), "exit_status": status, "output": output[-6000:]}
    return ended | {"seconds": round(time.monotonic() - begin, 2)}


def _wait(child: int, until: float) -> int | None:
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run(words: list[str], cwd: str, output: int) -> None:
    """Become `pidistill WORDS`. Does not return."""
    os.setpgid(0, 0)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    sys.argv = ["pidistill", *words]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from pidistill.commands.main import main as command

    status = 1
    try:
        command()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if not isinstance(ended.code, int | None):
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
