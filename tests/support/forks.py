"""Run recipes in forks of a process that has imported everything, which saves five seconds of imports for each process.

The program reads one JSON object a line. For {"recipe", "words", "folder", "log"}, where the recipe may be "tune", it forks,
answers with the child's process id, waits for the child, and answers with its exit status (negative after a signal). For
{"processes", "runs", "log"} it forks once for each rank, lets the ranks run one recipe after another in one process group, and
answers with all exit statuses.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from tests.support.runs import RECIPES, ROOT, environment, run, save_config

TIMEOUT_S = 900  # a hang, not a slow machine


class Fork:
    """Holds one program that runs in a process of its own with the ``words`` of a command line; its log has what it printed."""

    def __init__(self, server: subprocess.Popen, recipe: str, words: list[str], log: Path, folder: Path = ROOT) -> None:
        assert server.stdin is not None and server.stdout is not None
        request = {"recipe": recipe, "words": words, "folder": str(folder), "log": str(log)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        self._answers, self.log, self._status = server.stdout, log, None
        self.pid: int = json.loads(self._answers.readline())

    def send(self, signum: int) -> None:
        """Send a signal; a process that has ended by itself is left alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def wait(self) -> int:
        """Return the exit status once the process has ended."""
        if self._status is None:
            self._status = json.loads(self._answers.readline())
        return self._status


def _start_server() -> subprocess.Popen:
    program = [sys.executable, "-m", "tests.support.forks"]
    variables = environment(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, cwd=ROOT, env=variables, start_new_session=True, **pipes)


@contextlib.contextmanager
def forking_server() -> Iterator[subprocess.Popen]:
    with _start_server() as server:
        yield server
        assert server.stdin is not None
        server.stdin.close()


shared_server = functools.cache(_start_server)  # it ends when the tests end and close its standard input


def run_recipe(recipe: str, words: list[str], folder: Path = ROOT) -> str:
    """Run recipes/<recipe>.py in ``folder`` with the ``words`` of a command line; return what it printed.

    Raises AssertionError with the end of the output where it fails.
    """
    with tempfile.NamedTemporaryFile() as file:
        status = Fork(shared_server(), recipe, words, Path(file.name), folder).wait()
        printed = Path(file.name).read_text()
    assert status == 0, f"exit status {status}: {printed[-4000:]}"
    return printed


def run_tune(words: list[str]) -> tuple[int, str]:
    """Run `tune` with the ``words`` of its command line in the checkout; return its exit status and what was printed.

    Processes that `tune run` launches are started as it always starts them.
    """
    with tempfile.NamedTemporaryFile() as file:
        status = Fork(shared_server(), "tune", words, Path(file.name)).wait()
        return status, Path(file.name).read_text()


def launch_several(folder: Path, runs: dict[str, tuple[str, DictConfig]], processes: int = 2) -> None:
    """Run all ``runs``, name → (config of configs/tiny, its settings), one after another in one group of ``processes``.

    Raises AssertionError with the end of the output where a process fails, and after `TIMEOUT_S`.
    """
    folder.mkdir(exist_ok=True)
    listed = [[method, str(save_config(cfg, folder / f"{name}.yaml"))] for name, (method, cfg) in runs.items()]
    log = folder / "log.txt"
    server = shared_server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps({"processes": processes, "runs": listed, "log": str(log)}) + "\n")
    server.stdin.flush()
    if not select.select([server.stdout], [], [], TIMEOUT_S)[0]:
        shared_server.cache_clear()
        os.killpg(server.pid, signal.SIGKILL)
        raise AssertionError(f"{processes} processes did not end within {TIMEOUT_S} s: {log.read_text()[-3000:]}")
    statuses = json.loads(server.stdout.readline())
    assert statuses == [0] * processes, f"exit statuses {statuses}: {log.read_text()[-3000:]}"


# ------------------------------------------------------------------------------------------------- the program


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    programs = {name: importlib.import_module(f"recipes.{name}").recipe_main for name in set(RECIPES.values())}
    programs["tune"] = importlib.import_module("torchtune._cli.tune").main
    importlib.import_module("tests.support.worlds")

    from pidistill.envs.tiny_world import dataset
    from pidistill.envs.tiny_world.world import World, make_split

    splits = functools.cache(lambda seed: make_split(World(seed)))
    dataset.make_split = lambda world: splits(world.seed)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "processes" in request:
            answers.write(json.dumps(_run_ranks(**request)) + "\n")
            continue
        run_main = functools.partial(_run_main, programs[request["recipe"]], request["words"], request["folder"])
        child = _fork(run_main, request["log"])
        answers.write(f"{child}\n")
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")


def _run_ranks(processes: int, runs: list[list[str]], log: str) -> list[int]:
    """Return the exit status of each rank; one that fails ends the others, which would wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = {}
    for rank in range(processes):
        variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks[_fork(functools.partial(_run_all, variables, runs), log)] = rank
    statuses = [0] * processes
    running = set(ranks)
    while running:
        ended, status = os.wait()
        running.remove(ended)
        statuses[ranks[ended]] = os.waitstatus_to_exitcode(status)
        if status:
            for child in running:
                os.kill(child, signal.SIGKILL)
    return statuses


def _run_all(variables: dict[str, str], runs: list[list[str]]) -> None:
    """Run the recipes as one rank."""
    os.environ.update(variables)
    for name, path in runs:
        run(name, OmegaConf.load(path))
    importlib.import_module("torch.distributed").destroy_process_group()


def _run_main(program: Callable[[], object], words: list[str], folder: str) -> None:
    """Run the program as its command line does."""
    os.chdir(folder)
    sys.argv = ["program", *words]
    program()


def _fork(work: Callable[[], None], log: str) -> int:
    """Return the process id of a fork that does ``work`` and ends; what it prints goes to the end of ``log``."""
    child = os.fork()
    if child:
        return child
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    status = 1
    try:
        work()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
