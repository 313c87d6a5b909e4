"""Handle SIGTERM and SIGINT: a training run finishes its round, saves and ends; before training begins, it ends at once.

Exit status: 0 after SIGTERM, so that a job that was preempted counts as ended in order, and 130 after SIGINT. A recipe that
saves no checkpoint (evaluation, sampling) ends with 143 after SIGTERM, since its work is lost.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from pidistill.errors import InputError, StopRequest

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit, StopRequest):
    """End the process with a sentence on stderr and an exit status, without a traceback."""

    def __init__(self, sentence: str, signum: int, saves: bool = True) -> None:
        super().__init__(130 if signum == signal.SIGINT else 0 if saves else 128 + signum)
        self.sentence = sentence


class FailedBetweenUpdates(InputError):
    """Say why a run ends between two updates: all that it has trained is whole, and every process raises this alike."""


@contextlib.contextmanager
def between_updates(processes: int) -> Iterator[None]:
    """Mark an InputError of the block as one that came between two updates.

    With several ``processes`` one of them may have met it alone, while the others wait for it: none of them can save then, and
    the error stays as it is, unless it was raised from numbers that all of them share.
    """
    try:
        yield
    except FailedBetweenUpdates:
        raise
    except InputError as error:
        if processes > 1:
            raise
        raise FailedBetweenUpdates(str(error)) from error


@dataclass
class _State:
    """Hold what the handler knows: whether the recipe saves checkpoints, whether it trains by now, and what was received."""

    saves: bool = False
    training: bool = False
    received: int = 0


_state = _State()


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Handle SIGTERM and SIGINT while a recipe runs in the main thread; afterwards restore the former handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _state
    _state = _State()
    former = {signum: signal.signal(signum, _handle) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
        _state = _State()


def training_run() -> None:
    """Say that this recipe saves checkpoints, from which a later run resumes."""
    _state.saves = True


def training_begins() -> None:
    """Say that a signal from here on waits for the end of the round."""
    _state.training = True


def received_signal() -> int:
    """Return the number of the signal that asked this process to stop, or 0."""
    return _state.received


def _handle(signum: int, frame: FrameType | None) -> None:
    name = signal.Signals(signum).name
    if not _state.training:
        what = "training began; nothing is lost" if _state.saves else "the end; nothing is saved"
        raise Stopped(f"{name}: stopped before {what}", signum, _state.saves)
    # torchrun sends SIGTERM after the terminal's SIGINT: only a second SIGINT means that the user does not want to wait.
    if signum == signal.SIGINT and _state.received == signal.SIGINT:
        raise Stopped("SIGINT again: stopped without saving; the last checkpoint is whole", signum)
    if not _state.received:
        _state.received = signum
        end = "; a second SIGINT stops at once" if signum == signal.SIGINT else ""
        print(f"\n{name}: the round is finished and saved, then the run stops{end}", file=sys.stderr, flush=True)
