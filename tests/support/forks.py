"""Run recipes in forks of a process that has imported everything: a process of its own, in a tenth of a second.

The program reads one JSON object a line, {"recipe", "config", "log"}, forks, answers with the child's process id, waits for the
child, and answers with its exit status (negative after a signal).
"""

import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.runs import ROOT, environment


class Fork:
    """Holds one recipe that runs in a process of its own; its log has what it printed."""

    def __init__(self, server: subprocess.Popen, recipe: str, config: Path, log: Path) -> None:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps({"recipe": recipe, "config": str(config), "log": str(log)}) + "\n")
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


@contextlib.contextmanager
def forking_server() -> Iterator[subprocess.Popen]:
    program = [sys.executable, "-m", "tests.support.forks"]
    with subprocess.Popen(
        program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(PYTHONPATH=str(ROOT))
    ) as server:
        yield server
        assert server.stdin is not None
        server.stdin.close()


# ------------------------------------------------------------------------------------------------- the program


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    names = ("pi_distill_distributed", "opsd_distributed", "sft_distributed")
    recipes = {name: importlib.import_module(f"recipes.{name}") for name in names}
    importlib.import_module("tests.support.worlds")

    from pidistill.envs.tiny_world import dataset
    from pidistill.envs.tiny_world.world import World, make_split

    splits = functools.cache(lambda seed: make_split(World(seed)))
    dataset.make_split = lambda world: splits(world.seed)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(recipes[request["recipe"]], request["config"], request["log"])
        answers.write(f"{child}\n")
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")


def _become(recipe: object, config: str, log: str) -> None:
    """Run the recipe as its command line does, and end the process."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["recipe", "--config", config]
    status = 1
    try:
        recipe.recipe_main()
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
