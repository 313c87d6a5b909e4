"""Calls that may hang: a time limit for each, and several at once, in threads that never keep the process alive."""

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from pidistill.envs.base import EnvironmentTimeout

T = TypeVar("T")

CALL_THREAD = "pidistill environment call"


def ask(call: Callable[[], T], timeout_s: float | None) -> T:
    """``call()`` in this thread or, with a limit, in one of its own.

    A thread cannot be stopped: one that is late is abandoned, and what it still answers goes nowhere.

    Raises:
        EnvironmentTimeout: no answer within ``timeout_s`` seconds; and whatever the call raises.
    """
    if timeout_s is None:
        return call()
    answer: Future[T] = Future()
    threading.Thread(target=_settle, args=(answer, call), daemon=True, name=CALL_THREAD).start()
    wait([answer], timeout_s)
    if not answer.done():
        raise EnvironmentTimeout(f"no answer within {timeout_s:g} s")
    return answer.result()


def abandoned_calls() -> int:
    """How many calls with a time limit have not come back yet."""
    return sum(thread.name == CALL_THREAD for thread in threading.enumerate())


class DaemonThreads:
    """``count`` threads that serve calls in the order of their arrival.

    ThreadPoolExecutor's threads are joined when the interpreter ends, and one that hangs would keep it for ever; so would the
    end of its `with` block after an error. These are daemons, and leaving the block waits for nobody.
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
        answer: Future[T] = Future()
        self._calls.put((answer, lambda: call(*args)))
        return answer

    def map(self, call: Callable[..., T], *columns: Iterable[Any]) -> list[T]:
        """The answers in order; an exception is raised where its answer would stand."""
        answers = [self.submit(call, *args) for args in zip(*columns, strict=True)]
        return [answer.result() for answer in answers]

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            _settle(*item)


def _settle(answer: Future, call: Callable[[], Any]) -> None:
    try:
        answer.set_result(call())
    except BaseException as error:  # SystemExit too: it would end this thread and leave the answer open for ever
        answer.set_exception(error)
