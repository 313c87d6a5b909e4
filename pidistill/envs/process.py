"""Run any environment in worker processes: a worker that hangs or dies is replaced, and costs one episode.

The state of an episode travels: a worker gets it with the turn and gives it back with the answer. So any worker serves any
episode, any number of episodes share few workers, and a worker that dies takes with it only the call that it was working on.
"""

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from pidistill.envs.base import (
    Environment,
    EnvironmentCrash,
    EnvironmentOutputError,
    EnvironmentTimeout,
    EnvStep,
    check_step,
    judge_unfinished,
)
from pidistill.envs.streams import RandomStreams
from pidistill.errors import InputError, attempt, bounded_repr, bounded_traceback
from pidistill.types import Example, Message

_START_S = 300.0  # limit for the start of a process, which imports torch on a machine that may be busy
_MAX_ERROR_BYTES = 100_000
_NUMBER_BYTES = 8  # of the number that a request and its answer begin with


@dataclass
class _State:
    """Hold an episode between two calls: its pickled state and random streams; None before an answer to `reset`."""

    pickled: bytes | None = None


class ProcessEnvironment:
    """Run ``environment`` in ``workers`` processes, each call with a time limit of its own.

    It is meant for environments that may hang without letting go of Python's lock, or crash (native code): a thread cannot be
    stopped, a process can. Set ``environment_threads`` to the number of workers, or more: with one thread one worker is busy at
    a time. The environment and its states must be picklable; a state that is not costs its episode. In a worker the global
    streams of `random` and numpy are each episode's own, seeded with the example's id, so that the answers do not depend on
    which worker gives them.

    Attributes:
        environment: runs in the workers; more processes than one are used only where calls come at the same time.
        workers: largest number of processes; they start when they are needed. Every rank has its own.
        timeout_s: seconds that one `reset` or `step` may take; a worker that is late is killed. null is no limit. Waiting for
            a free worker does not count here, but does in ``environment_timeout_s``: leave that null.
    """

    def __init__(self, environment: Environment, workers: int = 4, timeout_s: float | None = 60.0) -> None:
        if type(workers) is not int or workers < 1:
            raise InputError(f"environment.workers is {workers!r}; give at least 1 process")
        if timeout_s is not None and not 0 < timeout_s < float("inf"):
            raise InputError(f"environment.timeout_s is {timeout_s}; give a number of seconds above 0, or null for no limit")
        self.environment, self.workers, self.timeout_s = environment, workers, timeout_s
        try:
            self._pickled = pickle.dumps(environment)
        except Exception as error:
            raise InputError(
                f"{type(environment).__name__} cannot be sent to a worker process ({error}); use it without "
                "ProcessEnvironment, with environment_timeout_s"
            ) from error
        self._free = threading.Semaphore(workers)
        self._has_started = False  # True once a worker has started, so that the environment can be made in one
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()
        # At exit multiprocessing asks workers to end and waits for them; one that hangs in native code would never end.
        weakref.finalize(self, _kill_all, self._alive)

    def reset(self, example: Example) -> _State:
        state = _State()
        self._call(state, ("reset", example))
        return state

    def step(self, state: _State, turn: Message, *, truncated: bool) -> EnvStep:
        return self._call(state, ("step", state.pickled, turn, truncated))

    def unfinished(self, state: _State) -> EnvStep:
        return self._call(state, ("unfinished", state.pickled))

    def _call(self, state: _State, request: tuple) -> Any:
        message = pickle.dumps(request)
        with self._free:
            worker = self._take()
            try:
                answer = worker.ask(message, self.timeout_s)
            except BaseException:
                self._alive.discard(worker)
                worker.kill()
                raise
            self._idle.append(worker)
        error, value, pickled = pickle.loads(answer)
        if error is not None:
            raise error
        state.pickled = pickled
        return value

    def _take(self) -> "_Worker":
        while (worker := self._pop_idle()) is not None:
            if worker.process.is_alive():
                return worker
            self._alive.discard(worker)
        try:
            worker = _Worker(self._pickled, type(self.environment).__module__)
        except InputError as error:
            if self._has_started:  # it could be made before, so that the failure may be temporary
                raise EnvironmentCrash(str(error)) from error
            raise
        self._has_started = True
        self._alive.add(worker)
        return worker

    def _pop_idle(self) -> "_Worker | None":
        try:  # not `if self._idle`: another thread may take the last one in between
            return self._idle.pop()
        except IndexError:
            return None


class _Worker:
    """Hold a process and the pipe to it."""

    def __init__(self, environment: bytes, module: str) -> None:
        # Forked from a server that has done the imports and has neither threads nor a GPU. Only the first call counts.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__, module])
        self._asked = 0  # requests so far
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, environment), daemon=True)
        self.process.start()
        theirs.close()
        try:
            error = pickle.loads(self._receive(_START_S))
        except BaseException:
            self.kill()
            raise
        if error is not None:
            self.kill()
            raise InputError(f"the environment cannot be made in a worker process: {bounded_repr(error, 500)}") from error

    def ask(self, request: bytes, timeout_s: float | None) -> bytes:
        """Return the worker's answer; refuse one to another request, which would be the verdict on another episode."""
        self._asked += 1
        number = self._asked.to_bytes(_NUMBER_BYTES, "big")
        try:
            self._connection.send_bytes(number + request)
        except OSError as error:
            raise self._died() from error
        answer = self._receive(timeout_s)
        if not answer.startswith(number):
            raise EnvironmentCrash(
                "its process sent an answer that belongs to no call or to an earlier one, and was killed; check whether the "
                "environment writes to files or pipes that it did not open"
            )
        return answer[_NUMBER_BYTES:]

    def kill(self) -> None:
        _kill_group(self.process)
        self.process.join()
        self._connection.close()

    def _receive(self, timeout_s: float | None) -> bytes:
        # Not the connection alone: a process that native code has forked may hold its other end after the worker's death.
        has_ended = self.process.sentinel in wait([self._connection, self.process.sentinel], timeout_s)
        try:
            if self._connection.poll():  # also where the worker died after its answer
                return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if has_ended:
            raise self._died()
        raise EnvironmentTimeout(f"no answer within {timeout_s:g} s; its process was killed")

    def _died(self) -> EnvironmentCrash:
        self.process.join(10)
        code = self.process.exitcode
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return EnvironmentCrash(f"its process died {how}")


def _kill_all(workers: set[_Worker]) -> None:
    for worker in workers:
        _kill_group(worker.process)


def _kill_group(process: multiprocessing.process.BaseProcess) -> None:
    """Kill a worker and the programs that its environment has started; the worker leads a process group of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if not process.is_alive() or os.getpgid(process.pid) == process.pid:  # false until the worker's first line has run
            os.killpg(process.pid, signal.SIGKILL)  # also the group of a dead worker: what it started may still run
    process.kill()


# ---------------------------------------------------------------------------------------------- in the worker


def _serve(connection: Connection, pickled: bytes) -> None:
    worker = os.getpid()
    os.register_at_fork(after_in_child=connection.close)  # so that the pipe closes when the worker dies
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c reaches every process of the terminal; the parent decides
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    environment, error = attempt(lambda: pickle.loads(pickled))
    _end_if_forked(worker)
    if error is not None:
        connection.send_bytes(_pickled_error(error))
        return
    connection.send_bytes(pickle.dumps(None))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        number, request = request[:_NUMBER_BYTES], request[_NUMBER_BYTES:]
        answer = _answer(environment, pickle.loads(request))
        _end_if_forked(worker)
        connection.send_bytes(number + answer)


def _end_if_forked(worker: int) -> None:
    """End a child that the environment has forked and that came back from its call: only the worker itself answers.

    Nothing is flushed: the texts that the child holds are copies of the worker's.
    """
    if os.getpid() != worker:
        os._exit(0)


def _end_with_the_parent() -> None:
    """End this worker when the parent has died; idle workers see the pipe close, and one that hangs does not."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def _answer(environment: Environment, request: tuple) -> bytes:
    """Return (exception, value, state and streams) pickled."""
    answer, error = attempt(lambda: _REQUESTS[request[0]](environment, *request[1:]))
    if error is None:
        return answer
    return pickle.dumps((pickle.loads(_pickled_error(error)), None, None))


def _reset(environment: Environment, example: Example) -> bytes:
    digest = hashlib.blake2b(example.id.encode(errors="backslashreplace"), digest_size=4).digest()
    streams = RandomStreams(int.from_bytes(digest, "big"))
    with streams.in_use():
        state = environment.reset(example)
    return pickle.dumps((None, None, _pickled_state(environment, state, streams)))


def _step(environment: Environment, pickled: bytes, turn: Message, truncated: bool) -> bytes:
    state, streams = pickle.loads(pickled)
    with streams.in_use():
        step = check_step(environment.step(state, turn, truncated=truncated), rewarded=False)  # the caller asks again
    return pickle.dumps((None, step, _pickled_state(environment, state, streams)))


def _unfinished(environment: Environment, pickled: bytes) -> bytes:
    state, streams = pickle.loads(pickled)
    with streams.in_use():
        step = check_step(judge_unfinished(environment, state), rewarded=False)
    return pickle.dumps((None, step, pickled))


_REQUESTS = {"reset": _reset, "step": _step, "unfinished": _unfinished}


def _pickled_state(environment: Environment, state: Any, streams: RandomStreams) -> bytes:
    try:
        return pickle.dumps((state, streams))
    except Exception as error:
        raise EnvironmentOutputError(
            f"a state of {type(environment).__name__} cannot be pickled ({bounded_repr(error, 300)}), so it cannot be kept "
            "between two calls of worker processes; use the environment without ProcessEnvironment, with environment_timeout_s"
        ) from error


def _pickled_error(error: BaseException) -> bytes:
    """Return the exception with its traceback as a note, or its text where it does not survive the way to the parent."""
    note = f"in the worker process:\n{bounded_traceback(error)}"
    pickled, failure = attempt(lambda: _with_note(error, note))
    if failure is None:
        return pickled
    told = RuntimeError(bounded_repr(error, 500))
    told.add_note(note)
    return pickle.dumps(told)


def _with_note(error: BaseException, note: str) -> bytes:
    error.add_note(note)
    pickled = pickle.dumps(error)
    if len(pickled) > _MAX_ERROR_BYTES:
        raise ValueError("the exception is too large to be sent")
    pickle.loads(pickled)
    return pickled
