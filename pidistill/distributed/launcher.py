"""Let torchrun end as the run does: with the sentence of a refusal as the last line, and after a signal not before the run.

torchrun ends with a traceback and a summary of some 30 lines when a process fails. A process that refuses its input therefore
writes the sentence into the error file that torchrun gives it, and the launching process prints it in place of these lines.
The entry point `torchrun.handlers` in pyproject.toml imports this module in that process, for `tune run` and torchrun as for
`pidistill run`: torch offers the entry point for rendezvous handlers, and it imports nothing else of another package there.

A run that is told to stop finishes its round and saves. torchrun kills it after 30 s, which `pidistill run` changes.
"""

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from pidistill.errors import escape_controls

# Set in the environment by a launching process that prints the sentence itself.
PRINTS_LAST = "PIDISTILL_LAUNCHER_PRINTS"
_KEY = "pidistill_refusal"
# How many seconds torchrun waits for processes that it has told to end, before it kills them.
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def refuse(sentence: str, *, is_first: bool) -> None:
    """Hand the sentence to torchrun, where it launched this process; print it on one process unless the launcher will."""
    sentence = f"error: {escape_controls(' '.join(sentence.split()))}"
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(error_file).write_text(json.dumps({"message": message, _KEY: sentence}), encoding="utf-8")
    close_progress_bars()
    if is_first and not (error_file and os.environ.get(PRINTS_LAST)):
        print(sentence, file=sys.stderr, flush=True)


def close_progress_bars() -> None:
    """End the lines of all progress bars, so that what follows begins a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def refusal(error: BaseException) -> str | None:
    """Return the sentence with which a process of a torchrun launch refused its input; None for any other failure."""
    failures = getattr(error, "failures", {})
    sentences = (failure.error_file_data.get(_KEY) for failure in failures.values())
    return next((sentence for sentence in sentences if sentence), None)


def print_refusals() -> None:
    """Print a refusal in place of the traceback with which this process would end."""
    os.environ[PRINTS_LAST] = "1"
    if not getattr(sys.excepthook, "prints_refusals", False):
        sys.excepthook = _hook(sys.excepthook)


def stopped_by(error: BaseException) -> str | None:
    """Return the sentence that a signal stopped the run; None for any other exception than torchrun's SignalException."""
    number = getattr(error, "sigval", None)
    return None if number is None else f"the run was stopped by {signal.Signals(number).name}"


def wait_for_processes() -> None:
    """Let torchrun wait a day for the processes that a signal has told to end: a scheduler has a limit of its own.

    A second signal is handed on as it is, where torch would send SIGTERM: a second SIGINT ends a run at once. The exception
    gets the attribute ``status``, the exit status of the process that ended worst.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    os.environ.setdefault(SHUTDOWN_TIMEOUT, str(24 * 60 * 60))
    former = LocalElasticAgent._shutdown

    @functools.wraps(former)
    def shut_down(agent: Any, death_sig: Any = signal.SIGTERM, *timeout: Any, **named: Any) -> None:
        error: Any = sys.exc_info()[1]
        death_sig = getattr(error, "sigval", death_sig)
        former(agent, death_sig, *timeout, **named)
        if stopped_by(error) and agent._pcontext is not None:
            ended = [handler.proc.returncode for handler in agent._pcontext.subprocess_handlers.values()]
            error.status = max((code if code >= 0 else 128 - code for code in ended), default=0)

    LocalElasticAgent._shutdown = shut_down  # type: ignore[method-assign]


def _hook(former: Any) -> Any:
    @functools.wraps(former)
    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if sentence := refusal(error) or stopped_by(error):
            print(sentence, file=sys.stderr, flush=True)
        else:
            former(kind, error, traceback)

    hook.prints_refusals = True  # type: ignore[attr-defined]
    return hook


def torchrun_handler() -> Any:
    """Return torch's own rendezvous handler under our name, as the entry point must, after :func:`print_refusals`."""
    from torch.distributed.elastic.rendezvous.registry import _create_c10d_handler

    if "TORCHELASTIC_RUN_ID" not in os.environ:  # a launched process imports torch too, and launches nothing
        print_refusals()
    return _create_c10d_handler
