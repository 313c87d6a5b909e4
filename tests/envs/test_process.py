"""Test environments in worker processes: one that hangs or dies costs one episode, and the others play as in this process."""

import ctypes
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pidistill.envs import EnvironmentCrash, EnvironmentOutputError, EnvironmentTimeout, EnvStep, ProcessEnvironment, SingleTurn
from pidistill.envs.streams import RandomStreams
from pidistill.errors import InputError
from pidistill.rollouts import DROP_REASONS
from pidistill.types import Example
from tests.support.episodes import assistant, tool
from tests.support.ill_worlds import FIRST, RESET, SECOND, Ill, healthy_numbers, numbers, play


class Fatal(Ill):
    """As :class:`Ill`, with faults that end a process."""

    def fail(self, state, when):
        where, what = self.faults.get(state["row"], (None, None))
        if where == when and what in DEADLY:
            DEADLY[what]()
        return super().fail(state, when)


class Unpicklable(Exception):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")


class Talkative:
    """Does what the turn says, and counts the turns."""

    def reset(self, example):
        if example.id == "refused":
            raise InputError("no such task")
        return {"turns": 0, "thread": threading.Lock() if example.id == "unpicklable" else None, "drawn": random.random()}

    def step(self, state, turn, *, truncated):
        state["turns"] += 1
        match turn["content"]:
            case "draw":
                return EnvStep([tool(f"{state['drawn']} {random.random()} {np.random.rand()}")], 0.0, False)
            case "pid":
                return EnvStep([tool(str(os.getpid()))], float(state["turns"]), False)
            case "raise":
                raise Unpicklable(5, "bad sandbox")
            case "key":
                return {}["gone"]
            case "None":
                return None
            case deadly:
                DEADLY[deadly]()


def loop():
    while True:
        pass


def backtrack():
    re.match(r"(a+)+$", "a" * 60 + "b")  # holds Python's lock: no thread of the process could stop it


def deaf_loop():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loop()


DEADLY = {
    "_exit": lambda: os._exit(7),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "loop": loop,
    "deaf": deaf_loop,
    "backtrack": backtrack,
}


@pytest.fixture(scope="module")
def talkative():
    return ProcessEnvironment(Talkative(), workers=2, timeout_s=2.0)


def row(name="row"):
    return Example(id=name, messages=[])


def say(environment, state, text):
    return environment.step(state, assistant(text), truncated=False)


def test_states_travel_with_their_episodes(talkative):
    first, second = talkative.reset(row()), talkative.reset(row("other"))
    assert [say(talkative, first, "pid").reward for _ in range(3)] == [1.0, 2.0, 3.0]
    assert say(talkative, second, "pid").reward == 1.0
    pids = {say(talkative, state, "pid").observations[0]["content"] for state in (first, second)}
    assert len(pids) == 1 and str(os.getpid()) not in pids  # called one after the other, they need one worker


class Ended(Talkative):
    def unfinished(self, state):
        return EnvStep([], float(state["turns"]), True)


def test_a_worker_judges_an_unfinished_episode(talkative):
    ended = ProcessEnvironment(Ended(), workers=1, timeout_s=2.0)
    state = ended.reset(row())
    say(ended, state, "pid")
    assert ended.unfinished(state).reward == 1.0
    assert talkative.unfinished(talkative.reset(row())).reward == 0.0, "an environment without a verdict adds nothing"


def test_two_threads_that_want_the_last_idle_worker_both_get_one(talkative):
    class TakenInBetween(list):
        def __len__(self):
            return 1  # as it looked a moment ago

    idle, talkative._idle = talkative._idle, TakenInBetween()
    try:
        assert say(talkative, talkative.reset(row()), "pid").reward == 1.0
    finally:
        talkative._idle = [*idle, *list.__iter__(talkative._idle)]


@pytest.mark.parametrize(
    ("deadly", "error", "told"),
    [
        ("_exit", EnvironmentCrash, "its process died with exit code 7"),
        ("segfault", EnvironmentCrash, "its process died by SIGSEGV"),
        ("backtrack", EnvironmentTimeout, r"no answer within 2 s; its process was killed"),
    ],
)
def test_a_process_that_dies_or_hangs_is_replaced_and_other_episodes_go_on(talkative, deadly, error, told):
    ill, well = talkative.reset(row()), talkative.reset(row())
    before = say(talkative, well, "pid")
    with pytest.raises(error, match=told):
        say(talkative, ill, deadly)
    after = say(talkative, well, "pid")
    assert (before.reward, after.reward) == (1.0, 2.0) and before.observations != after.observations


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [("raise", RuntimeError, "bad sandbox"), ("key", KeyError, "gone"), ("None", EnvironmentOutputError, "not an EnvStep")],
)
def test_an_exception_in_a_worker_arrives_with_its_traceback(talkative, text, error, told):
    state = talkative.reset(row())
    pid = say(talkative, state, "pid").observations
    with pytest.raises(error, match=told) as raised:
        say(talkative, state, text)
    assert "in the worker process" in raised.value.__notes__[0] and "Traceback" in raised.value.__notes__[0]
    assert say(talkative, state, "pid").observations == pid, "an exception needs no new process"


def test_wrong_arguments_of_process_environments_are_refused(talkative):
    with pytest.raises(InputError, match="no such task"):
        talkative.reset(row("refused"))
    with pytest.raises(InputError, match="SingleTurn cannot be sent to a worker process"):
        ProcessEnvironment(SingleTurn(lambda example, turns: 1.0))
    with pytest.raises(InputError, match=r"environment\.workers is 0"):
        ProcessEnvironment(Talkative(), workers=0)
    with pytest.raises(InputError, match=r"environment\.timeout_s is 0"):
        ProcessEnvironment(Talkative(), timeout_s=0)


def test_a_state_that_cannot_be_pickled_costs_its_episode(talkative):
    with pytest.raises(EnvironmentOutputError, match="a state of Talkative cannot be pickled .*lock"):
        talkative.reset(row("unpicklable"))
    assert say(talkative, talkative.reset(row()), "pid").reward == 1.0


class Made:
    """Can be made in a worker as long as its file is there."""

    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        self.__dict__.update(state)
        open(self.path).close()

    def reset(self, example):
        if example.id == "die":
            os.unlink(self.path)
            os._exit(3)
        return {}

    def step(self, state, turn, *, truncated):
        return EnvStep([], 1.0, True)


def test_an_environment_that_cannot_be_made_is_refused_at_first_and_costs_episodes_later(tmp_path):
    path = tmp_path / "there"
    environment = ProcessEnvironment(Made(str(path)), workers=1)
    with pytest.raises(InputError, match="cannot be made in a worker process: FileNotFoundError"):
        environment.reset(row())
    path.touch()
    assert say(environment, environment.reset(row()), "x").reward == 1.0
    with pytest.raises(EnvironmentCrash, match="exit code 3"):
        environment.reset(row("die"))
    with pytest.raises(EnvironmentCrash, match="cannot be made in a worker process"):
        environment.reset(row())


def test_an_episodes_random_numbers_are_its_own(talkative):
    """The same in any process and whatever is drawn between, and this process's streams stay where they were."""
    here = np.random.get_state()[1].tolist()  # the type checker of the tests draws from `random`
    states = [talkative.reset(row(name)) for name in ("a", "b", "a")]
    order = [0, 1, 0, 2, 1, 2]
    with ThreadPoolExecutor(2) as threads:  # and so two workers
        said = list(threads.map(lambda i: (i, say(talkative, states[i], "draw").observations[0]["content"]), order[:2]))
    said += [(i, say(talkative, states[i], "draw").observations[0]["content"]) for i in order[2:]]
    drawn = [[text for i, text in said if i == episode] for episode in range(3)]
    assert drawn[0] == drawn[2] != drawn[1] and len(set(drawn[0])) == 2
    assert here == np.random.get_state()[1].tolist()


def test_streams_continue_where_they_stood():
    streams = RandomStreams(5)
    expected = random.Random(5)
    for _ in range(3):
        with streams.in_use():
            assert random.random() == expected.random()
        streams = pickle.loads(pickle.dumps(streams))
        random.random()


class Forking:
    """Does what the turn says with forked processes; every answer names its episode."""

    def __getstate__(self):
        return {"forks": True}

    def __setstate__(self, state):
        os.fork()  # both processes come back

    def reset(self, example):
        return example.id

    def step(self, state, turn, *, truncated):
        match turn["content"]:
            case "fork":
                os.fork()
            case "native fork":
                ctypes.PyDLL(None).fork()  # Python does not know of it, as of one that native code forks
            case "leave a child and die":
                if os.fork() == 0:
                    time.sleep(60)
                os._exit(7)
            case "leave a native child and die":
                if ctypes.PyDLL(None).fork() == 0:
                    time.sleep(60)
                os._exit(7)
            case "answer and die":
                answer, worker = pipe_of_this_worker()
                answer.send_bytes(worker["number"] + pickle.dumps((None, EnvStep([], 5.0, True), b"")))
                os._exit(7)
            case "send a stray answer":
                answer, _ = pipe_of_this_worker()
                answer.send_bytes(bytes(8) + pickle.dumps((None, EnvStep([], 5.0, True), b"")))
        return EnvStep([], float(state), True)


def pipe_of_this_worker():
    frame = sys._getframe()
    while "connection" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals["connection"], frame.f_locals


@pytest.mark.parametrize("text", ["fork", "native fork"])
def test_a_forked_child_that_comes_back_from_a_call_sends_no_second_answer(text):
    environment = ProcessEnvironment(Forking(), workers=1, timeout_s=30.0)
    rewards = [say(environment, environment.reset(row(str(n))), text if n % 2 else "") for n in range(6)]
    assert [step.reward for step in rewards] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("text", ["leave a child and die", "leave a native child and die"])
def test_a_worker_that_dies_is_seen_at_once_while_its_child_lives(text):
    environment = ProcessEnvironment(Forking(), workers=1, timeout_s=40.0)
    state = environment.reset(row("3"))
    begin = time.monotonic()
    with pytest.raises(EnvironmentCrash, match="its process died with exit code 7"):
        say(environment, state, text)
    assert time.monotonic() - begin < 20
    assert say(environment, state, "").reward == 3.0


def test_an_answer_that_was_sent_before_the_worker_died_counts():
    environment = ProcessEnvironment(Forking(), workers=1, timeout_s=30.0)
    state = environment.reset(row("3"))
    assert say(environment, state, "answer and die").reward == 5.0
    environment._idle[0].process.join(30)
    assert say(environment, environment.reset(row("4")), "").reward == 4.0, "the next call has a new worker"


def test_an_answer_to_another_call_is_refused_and_its_worker_replaced():
    environment = ProcessEnvironment(Forking(), workers=1, timeout_s=30.0)
    state = environment.reset(row("3"))
    with pytest.raises(EnvironmentCrash, match="belongs to no call or to an earlier one"):
        say(environment, state, "send a stray answer")
    assert say(environment, state, "").reward == 3.0


FAULTS = {  # episode: (when, what), as in tests/rollouts/test_calls.py
    3: (FIRST, "raise"), 9: (RESET, "_exit"), 14: (SECOND, "exit"), 17: (FIRST, "loop"), 25: (RESET, "loop"),
    33: (SECOND, "segfault"), 41: (FIRST, "role"), 50: (SECOND, "text as reward"), 58: (FIRST, "nan"),
}  # fmt: skip
COUNTS = dict(zip(DROP_REASONS, (2, 1, 2, 2, 2), strict=True))


def test_of_64_episodes_in_3_processes_only_those_that_fail_are_lost():
    healthy = healthy_numbers()
    assert min(len(healthy[row][6]) for row in FAULTS) >= 2, "a fault of a second turn would not happen"
    environment = ProcessEnvironment(Fatal(FAULTS, None), workers=3, timeout_s=2.0)
    result = play(environment, environment_threads=6)
    assert result.dropped == COUNTS
    assert [int(r.example.id) for r in result.rollouts] == [n for n in range(64) if n not in FAULTS]
    for rollout in result.rollouts:
        assert numbers(rollout)[:-1] == healthy[int(rollout.example.id)][:-1], rollout.example.id
    assert 1 <= len(environment._alive) <= 3


SCRIPT = """
import os, sys, threading
from tests.envs.test_process import ProcessEnvironment, Talkative, row, say
if __name__ == "__main__":
    environment = ProcessEnvironment(Talkative(), workers=2, timeout_s=None)
    state = environment.reset(row())
    print(say(environment, state, "pid").observations[0]["content"], flush=True)
    threading.Thread(target=say, args=(environment, state, "deaf"), daemon=True).start()
    while environment._idle:
        pass
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.slow(reason="test_process_groups.py ends a parent, its worker and the worker's programs")
@pytest.mark.parametrize("end", ["exit", "killed"])
def test_no_worker_outlives_its_run(end, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), end],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": os.pathsep.join([".", *sys.path])},
    )  # fmt: skip
    assert done.returncode == (0 if end == "exit" else -signal.SIGKILL), done.stderr
    begin, pid = time.monotonic(), int(done.stdout)
    while alive(pid):
        assert time.monotonic() - begin < 30, "the worker is still there"
        time.sleep(0.05)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
