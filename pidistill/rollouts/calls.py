"""Call what may hang: with a time limit for each call, several at once, in threads that never keep the process alive."""

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, TypeVar

from pidistill.envs.base import EnvironmentTimeout
from pidistill.errors import StopRequest

T = TypeVar("T")

CALL_THREAD = "pidistill environment call"


def ask(call: Callable[[], T], timeout_s: float | None) -> T:
    """Return ``call()``, made in this thread or, with a limit, in a thread of its own.

    A thread cannot be stopped: one that is late is abandoned with an EnvironmentTimeout, and its later answer is ignored.
    """
    if timeout_s is None:
        return call()
    answer: Future[T] = Future()
    threading.Thread(target=settle, args=(answer, call), daemon=True, name=CALL_THREAD).start()
    wait([answer], timeout_s)
    if not answer.done():
        raise EnvironmentTimeout(f"no answer within {timeout_s:g} s")
    return answer.result()


def abandoned_calls() -> int:
    """Return how many calls with a time limit have not come back yet."""
    return sum(thread.name == CALL_THREAD for thread in threading.enumerate())


class Interrupted(KeyboardInterrupt, StopRequest):
    """Mark the KeyboardInterrupt of a real Ctrl-C, in contrast to one that a user's code raises."""


@contextlib.contextmanager
def marked_interrupts() -> Iterator[None]:
    """Raise :class:`Interrupted` on SIGINT where Python's own handler would raise KeyboardInterrupt.

    A recipe has a handler of its own, which stays (:mod:`pidistill.training.interrupts`).
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted


class DaemonThreads:
    """Serve calls in the order of their arrival, in ``count`` threads.

    The threads of ThreadPoolExecutor are joined when the interpreter ends and when its `with` block ends, so one that hangs
    would keep the process alive forever. These threads are daemons, and leaving the block waits for none of them.
    """

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._count = count

    def __enter__(self) -> "DaemonThreads":
        for _ in range(self._count):
            threading.Thread(target=self._serve, daemon=True, name="pidistill environment").start()
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(self._count):
            self._calls.put(None)

    def submit(self, call: Callable[..., T], *args: Any) -> "Future[T]":
        """Queue a call and return the Future of its answer."""
        answer: Future[T] = Future()
        self._calls.put((answer, lambda: call(*args)))
        return answer

    def map(self, call: Callable[..., T], *columns: Iterable[Any]) -> list[T]:
        """Return the answers in order; an exception is raised where its answer would stand."""
        answers = [self.submit(call, *args) for args in zip(*columns, strict=True)]
        return [answer.result() for answer in answers]

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            settle(*item)


def settle(answer: Future, call: Callable[[], Any]) -> None:
    """Make the call, and put its answer or its exception where it is waited for."""
    try:
        answer.set_result(call())
    except BaseException as error:  # also SystemExit: it would end this thread, and the answer would never come
        answer.set_exception(error)
