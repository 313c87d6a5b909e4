"""Test environments that raise, hang or answer nonsense: each costs its own episode, and nothing waits for it."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from pidistill.envs import EnvironmentCrash, EnvironmentOutputError, EnvironmentTimeout, EnvStep, check_step
from pidistill.errors import InputError
from pidistill.rewards import LeakPenalty
from pidistill.rollouts.calls import DaemonThreads, abandoned_calls, ask
from pidistill.rollouts.collect import DROP_REASONS
from pidistill.training import interrupts
from tests.support.episodes import Script, collect, tool
from tests.support.ill_worlds import FIRST, OUTPUTS, RESET, SECOND, Ill, healthy_numbers, numbers, play, raw

# ---------------------------------------------------------------------------------------------- one call


@pytest.fixture
def release():
    """Set at the end of the test: what hangs until then ends."""
    event = threading.Event()
    yield event
    event.set()


def test_a_call_has_its_answer_or_its_exception_with_and_without_a_limit():
    for limit in (None, 30.0):
        assert ask(lambda: 7, limit) == 7
        with pytest.raises(KeyError, match="gone"):
            ask(lambda: {}["gone"], limit)
        with pytest.raises(TimeoutError, match="its own"):  # not ours: a socket's, say
            ask(lambda: (_ for _ in ()).throw(TimeoutError("its own")), limit)
    with pytest.raises(SystemExit):
        ask(lambda: sys.exit(3), 30.0)


def test_a_call_that_is_late_is_abandoned(release):
    before, begin = abandoned_calls(), time.monotonic()
    with pytest.raises(EnvironmentTimeout, match=r"no answer within 0\.05 s"):
        ask(release.wait, 0.05)
    assert time.monotonic() - begin < 20 and abandoned_calls() == before + 1
    release.set()
    while abandoned_calls() > before:
        time.sleep(0.01)


def test_threads_answer_in_order_and_do_not_wait_for_one_that_hangs(release):
    begin = time.monotonic()
    with DaemonThreads(3) as threads:
        assert threads.map(lambda a, b: a * b, range(20), range(20)) == [n * n for n in range(20)]
        with pytest.raises(ZeroDivisionError):
            threads.map(lambda n: 1 // n, [1, 0, 2])
        meeting = threading.Barrier(3, timeout=30)  # three at once
        threads.map(lambda _: meeting.wait(), range(3))
        hanging = threads.submit(release.wait)
    assert time.monotonic() - begin < 30 and not hanging.done()


SCRIPT = """
import signal, threading
from pidistill.envs import EnvironmentTimeout
from pidistill.rollouts.calls import DaemonThreads, ask
try:
    ask(threading.Event().wait, 0.05)
except EnvironmentTimeout:
    print("late", flush=True)
try:
    with DaemonThreads(2) as threads:
        answer = threads.submit(threading.Event().wait)
        print("waiting", flush=True)
        answer.result()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_neither_the_exit_nor_an_interrupt_waits_for_threads_that_hang():
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert [process.stdout.readline().strip() for _ in range(2)] == ["late", "waiting"]
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said.strip()) == (0, "interrupted"), errors


# ---------------------------------------------------------------------------------------------- what is an answer


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_answer_that_is_none_is_refused_with_its_cause(name):
    step, told = OUTPUTS[name]
    with pytest.raises(EnvironmentOutputError) as error:
        check_step(step)
    assert told in str(error.value)


def test_an_answer_comes_back_as_plain_numbers_and_messages():
    step = raw((tool("5"),), np.float32(0.5), np.bool_(False), {"a": torch.tensor(2.0), "b": 1, "c": True})
    checked = check_step(step)
    assert checked == EnvStep([tool("5")], 0.5, False, {"a": 2.0, "b": 1.0, "c": 1.0})
    assert type(checked.reward) is float and type(checked.done) is bool and type(checked.observations) is list
    assert math.isnan(check_step(EnvStep([], math.nan, True)).reward)


# ---------------------------------------------------------------------------------------------- 64 episodes, 9 of them ill

FAULTS = {  # episode: (when, what)
    3: (FIRST, "raise"), 9: (RESET, "raise"), 14: (SECOND, "exit"), 17: (FIRST, "hang"), 25: (RESET, "hang"),
    33: (SECOND, "hang"), 41: (FIRST, "role"), 50: (SECOND, "text as reward"), 58: (FIRST, "nan"),
}  # fmt: skip
COUNTS = dict(zip(DROP_REASONS, (3, 1, 2, 3, 0), strict=True))


@pytest.fixture
def healthy():
    healthy = healthy_numbers()
    assert min(len(healthy[row][6]) for row in FAULTS) >= 2, "a fault of a second turn would not happen"
    return healthy


@pytest.mark.parametrize("threads", [None, 8])
def test_failing_environments_cost_their_own_episodes_and_no_others(threads, healthy, release, caplog):
    begin = time.monotonic()
    result = play(Ill(FAULTS, release), environment_threads=threads, environment_timeout_s=2.0)
    assert time.monotonic() - begin < 60
    assert result.dropped == COUNTS
    assert [int(r.example.id) for r in result.rollouts] == [row for row in range(64) if row not in FAULTS]
    for rollout in result.rollouts:
        ours, theirs = numbers(rollout), healthy[int(rollout.example.id)]
        assert ours[:-1] == theirs[:-1], rollout.example.id
        assert ours[-1] == pytest.approx(theirs[-1], abs=1e-5)  # other rows share its batch: rounding alone differs
    assert "3 rollouts dropped (environment_timeout)" in caplog.text and "no answer within 2 s" in caplog.text
    hanging = re.search(r"(\d+) calls of the environment still hang in abandoned threads", caplog.text)
    assert int(hanging[1]) >= 3  # those of other tests may take a moment to end


def test_control_characters_of_an_exception_are_escaped_in_the_log(caplog):
    class Colourful(Late):
        def step(self, state, turn, *, truncated):
            raise RuntimeError("\x1b[2J\ud800")

    collect(Script("q."), Colourful(None), "a")
    assert "\x1b" not in caplog.text and "\\x1b[2J\\ud800" in caplog.text and "Traceback" in caplog.text


def test_a_late_answer_changes_nothing(release):
    (result,) = [collect(Script("q.", "x."), Late(release), environment_timeout_s=0.05)]
    assert [r.example.id for r in result.rollouts] == ["row a"] and result.dropped["environment_timeout"] == 1


class Late:
    def __init__(self, release):
        self.release = release

    def reset(self, example):
        return example.id

    def step(self, state, turn, *, truncated):
        if state == "row b":
            self.release.wait()
        return EnvStep([], 1.0, True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(EnvironmentCrash("pod gone"), "environment_crash"), (EnvironmentTimeout("30 s"), "environment_timeout")],
)
def test_an_environment_may_raise_timeout_or_crash_itself(error, reason, caplog):
    class Says(Late):
        def step(self, state, turn, *, truncated):
            if state == "row b":
                raise error
            return EnvStep([], 1.0, True)

    result = collect(Script("q.", "q."), Says(None))
    assert result.dropped == dict.fromkeys(DROP_REASONS, 0) | {reason: 1}
    assert str(error) in caplog.text and not any(record.exc_info for record in caplog.records)


def test_reward_shaping_does_not_hide_a_wrong_answer_of_the_environment():
    class Wrong(Late):
        def step(self, state, turn, *, truncated):
            return {"reward": 1.0} if state == "row b" else EnvStep([], 1.0, True)

    result = collect(Script("q.", "q."), Wrong(None), shaping=[LeakPenalty(["secret"])])
    assert result.dropped["environment_output"] == 1 and len(result.rollouts) == 1


def test_an_environment_that_does_not_fit_still_stops_the_run_with_a_limit():
    class Picky(Late):
        def reset(self, example):
            raise InputError(f"{example.id} has no task; use another dataset")

    for threads in (None, 2):
        with pytest.raises(InputError, match="row a has no task"):
            collect(Script("q."), Picky(None), "a", environment_timeout_s=30, environment_threads=threads)


# ---------------------------------------------------------------------------------------------- signals


class Signalled(Late):
    """In row b: sends a signal to this process, or raises what a signal would raise."""

    def __init__(self, act):
        self.act = act

    def step(self, state, turn, *, truncated):
        if state == "row b":
            self.act()
        return EnvStep([], 1.0, True)


def interrupt():
    raise KeyboardInterrupt


def send(signum):
    def act():
        time.sleep(0.3)  # until the main thread waits
        signal.pthread_kill(threading.main_thread().ident, signum)  # which gets a terminal's signals
        time.sleep(5)  # the handler runs first

    return act


LIMITS = [{}, {"environment_timeout_s": 30}, {"environment_timeout_s": 30, "environment_threads": 2}]


@pytest.mark.parametrize("limits", LIMITS)
def test_a_keyboard_interrupt_that_the_environment_raises_costs_its_episode(limits):
    result = collect(Script("q.", "q.", "q."), Signalled(interrupt), "abc", **limits)
    assert result.dropped["reward_error"] == 1 and [r.example.id for r in result.rollouts] == ["row a", "row c"]


@pytest.mark.parametrize("limits", LIMITS)
def test_a_real_interrupt_stops_the_collector_and_leaves_pythons_handler(limits):
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        collect(Script("q.", "q.", "q."), Signalled(send(signal.SIGINT)), "abc", **limits)
    assert time.monotonic() - begin < 20 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_training_ends_the_recipe_from_within_an_environment(signum):
    with interrupts.handle_signals(), pytest.raises(interrupts.Stopped, match=str(130 if signum == signal.SIGINT else 143)):
        collect(Script("q.", "q.", "q."), Signalled(send(signum)), "abc")


def test_a_signal_during_training_waits_and_a_second_interrupt_ends_the_recipe():
    with interrupts.handle_signals():
        interrupts.training_begins()
        act = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        result = collect(Script("q.", "q.", "q."), Signalled(act), "abc")
        assert len(result.rollouts) == 3 and interrupts.received_signal() == signal.SIGINT
        with pytest.raises(interrupts.Stopped):
            collect(Script("q.", "q.", "q."), Signalled(send(signal.SIGINT)), "abc")
