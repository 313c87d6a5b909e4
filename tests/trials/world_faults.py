"""Hold the faults of environments, rewards and judges that the trial plays, each under a name.

A fault is a function without arguments: it raises, or returns what is no answer. The same faults are put into several places
(`reset`, `step`, a reward, `reward_shaping`, a judge). They are found by name, so that they also reach worker processes.
"""

import asyncio
import ctypes
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import torch

from pidistill.envs import EnvStep, SingleTurn
from pidistill.errors import InputError
from pidistill.rewards import Constraints, RewardWithParts
from tests.support.episodes import assistant, tool
from tests.support.ill_worlds import raw

Fault = Callable[[], Any]
MEGABYTES = "x" * 3_000_000


# ---------------------------------------------------------------------------------------------- what is raised


class ReprRaises(Exception):
    def __repr__(self):
        raise ValueError("no repr")


class ReprAndTextRaise(Exception):
    def __repr__(self):
        raise KeyboardInterrupt

    def __str__(self):
        raise SystemExit(3)


class TwoArguments(Exception):
    """Cannot be unpickled: its constructor takes two arguments and stores one."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")


def raising(error: Callable[[], BaseException]) -> Fault:
    def fault():
        raise error()

    return fault


def cyclic_cause() -> BaseException:
    error = ValueError("its own cause")
    error.__cause__ = error
    return error


def recursion() -> None:
    recursion()


def with_lock() -> BaseException:
    error = RuntimeError("holds a lock")
    error.lock = threading.Lock()
    return error


RAISES: Mapping[str, Fault] = {
    "Exception": raising(lambda: Exception("fault")),
    "ZeroDivisionError": lambda: 1 / 0,
    "KeyError": lambda: {}["gone"],
    "AssertionError": raising(AssertionError),
    "RecursionError": recursion,
    "MemoryError": raising(MemoryError),
    "TimeoutError": raising(lambda: TimeoutError("a socket's")),
    "StopIteration": raising(StopIteration),
    "InputError": raising(lambda: InputError("one row is wrong")),
    "ExceptionGroup": raising(lambda: ExceptionGroup("several", [ValueError("a"), KeyError("b")])),
    "BaseException": raising(lambda: BaseException("fault")),
    "SystemExit": lambda: sys.exit(1),
    "SystemExit with status 0": lambda: sys.exit(0),
    "KeyboardInterrupt": raising(KeyboardInterrupt),
    "GeneratorExit": raising(GeneratorExit),
    "asyncio.CancelledError": raising(asyncio.CancelledError),
    "futures.CancelledError": raising(CancelledError),
    "repr raises": raising(ReprRaises),
    "repr and text raise BaseException": raising(ReprAndTextRaise),
    "cannot be unpickled": raising(lambda: TwoArguments(5, "gone")),
    "cannot be pickled": raising(with_lock),
    "megabytes of text": raising(lambda: RuntimeError(MEGABYTES)),
    "half a surrogate pair": raising(lambda: RuntimeError("\ud800")),
    "control characters": raising(lambda: RuntimeError("\x1b[2J\x1b]0;title\x07\r\n")),
    "its own cause": raising(cyclic_cause),
}


# ---------------------------------------------------------------------------------------------- what is returned


class NoFloat:
    def __float__(self):
        raise RuntimeError("no number")

    def __repr__(self):
        raise RuntimeError("no repr")


async def coroutine() -> float:
    return 1.0


NO_NUMBERS: Mapping[str, Any] = {
    "None": None,
    "NaN": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "text": "1.0",
    "bytes": b"1",
    "beyond fp32": 1e39,
    "a whole number of 5000 digits": 10**5000,
    "complex": 1j,
    "vector": np.ones(2),
    "NaN tensor": torch.tensor(math.nan),
    "tensor of two": torch.ones(2),
    "tuple": (1.0, {}),
    "mapping": {"reward": 1.0},
    "object without repr": NoFloat(),
    "function": len,
}


def endless() -> list:
    messages: list = [tool("x")]
    messages.append(messages)
    return messages


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


NO_STEPS: Mapping[str, Any] = {
    "None": None,
    "text": "obs",
    "wrong tuple": ([], 1.0, True),
    "mapping": {"reward": 1.0},
    "the class": EnvStep,
    "done is None": raw([], 0.0, None),
    "done is text": raw([], 0.0, "no"),
    "done is a vector": raw([], 0.0, np.array([True, False])),
    "observations are None": raw(None, 0.0, False),
    "observations are text": raw("obs", 0.0, False),
    "observations are endless": raw(endless(), 0.0, False),
    "an observation is text": raw(["obs"], 0.0, False),
    "an observation is None": raw([None], 0.0, False),
    "an observation without role": raw([{"content": "x"}], 0.0, False),
    "an observation of an unknown role": raw([{"role": "robot", "content": "x"}], 0.0, False),
    "an observation of an unhashable role": raw([{"role": [], "content": "x"}], 0.0, False),
    "an observation of the assistant": raw([assistant("x")], 0.0, False),
    "an observation without content": raw([{"role": "tool"}], 0.0, False),
    "content is a number": raw([tool(5)], 0.0, False),
    "content is half a surrogate pair": raw([tool("\ud800")], 0.0, False),
    "content is megabytes": raw([tool(MEGABYTES)], 0.0, False),
    "content is nested": raw([tool(nested(5000))], 0.0, False),
    "content is refused by the tokenizer": raw([tool("refuse")], 0.0, False),
    "content makes the tokenizer exit": raw([tool("exit")], 0.0, False),
    "a million observations": raw([tool("")] * 1_000_000, 0.0, False),
    "parts are a list": raw([], 0.0, True, [1.0]),
    "a part is text": raw([], 0.0, True, {"style": "high"}),
    "a part is NaN": raw([], 0.0, True, {"style": math.nan}),
    "a part has no text as name": raw([], 0.0, True, {5: 1.0}),
    "a part's name is half a surrogate pair": raw([], 0.0, True, {"\ud800": 1.0}),
    "a part's name has control characters": raw([], 0.0, True, {"\x1b[2J": 1.0}),
    "a part's name is megabytes": raw([], 0.0, True, {MEGABYTES: 1.0}),
    "ten thousand parts": raw([], 0.0, True, {str(n): 1.0 for n in range(10_000)}),
}
HARMLESS_STEPS: Mapping[str, Any] = {
    "a truth value as reward": raw([], True, True),
    "a tensor of one number as reward": raw([], torch.tensor(1.0), True),
    "control characters": raw([tool("\x1b[2J\x00")], 1.0, False),
    "no observations before the next turn": raw([], 1.0, False),
}
NO_TEXTS: Mapping[str, Any] = {
    "number": 5,
    "bytes": b"x",
    "list": ["x"],
    "half a surrogate pair": "\ud800",
    "megabytes": MEGABYTES,
}


# ---------------------------------------------------------------------------------------------- what ends a process


def loop() -> None:
    while True:
        pass


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def close_everything() -> None:
    os.closerange(3, 200)
    time.sleep(60)


DEADLY: Mapping[str, Fault] = {
    "os._exit": lambda: os._exit(7),
    "os._exit with status 0": lambda: os._exit(0),
    "os.abort": os.abort,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "memory that is not its own": lambda: ctypes.string_at(0),
    "stopped": stop_itself,
    "closed pipe": close_everything,
    "hang in Python": loop,
    "hang in native code": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
    "hang in sleep": lambda: time.sleep(60),
}


# ---------------------------------------------------------------------------------------------- parts with a fault

ILL_ROW = "row b"


def is_ill(example: Any) -> bool:
    return example.id == ILL_ROW


class FaultyWorld:
    """Two turns with an observation between them; in the ill row ``fault`` happens in ``place``: reset, step or end."""

    def __init__(self, place: str, fault: str):
        self.place, self.fault = place, fault

    def reset(self, example):
        if is_ill(example) and self.place == "reset":
            return FAULTS[self.fault]()
        return {"ill": is_ill(example), "turns": 0}

    def step(self, state, turn, *, truncated):
        if state is None or not isinstance(state, dict):
            return EnvStep([], 1.0, True)
        state["turns"] += 1
        if state["ill"] and self.place == ("step" if state["turns"] == 1 else "end"):
            return FAULTS[self.fault]()
        return EnvStep([] if state["turns"] == 2 else [tool("obs")], 1.0, state["turns"] == 2)


class FaultyReward:
    """A reward that fails in the ill row."""

    def __init__(self, fault: str):
        self.fault = fault

    def __call__(self, example, turns):
        return FAULTS[self.fault]() if is_ill(example) else 1.0


class FaultyShaping:
    """A part of `reward_shaping` that fails in the ill row."""

    name = "faulty"

    def __init__(self, fault: str):
        self.fault = fault

    def __call__(self, rollout):
        return FAULTS[self.fault]() if is_ill(rollout.example) else [0.0] * len(rollout.turn_rewards)


class FaultyText:
    """A judge, or what writes a sibling's text, that fails in the ill row."""

    def __init__(self, fault: str):
        self.fault = fault

    def __call__(self, example, turns):
        return FAULTS[self.fault]() if is_ill(example) else "look again"


def returning(value: Any) -> Fault:
    return lambda: value


FAULTS: dict[str, Fault] = {
    **{f"raises {name}": fault for name, fault in RAISES.items()},
    **{f"returns {name}": returning(value) for name, value in NO_NUMBERS.items()},
    **{f"reward is {name}": returning(raw([], value, True)) for name, value in NO_NUMBERS.items()},
    **{f"step gives {name}": returning(value) for name, value in (NO_STEPS | HARMLESS_STEPS).items()},
    **{f"writes {name}": returning(value) for name, value in NO_TEXTS.items()},
    **{f"ends with {name}": fault for name, fault in DEADLY.items()},
    "returns a coroutine": coroutine,
    "returns a part that is NaN": lambda: RewardWithParts(1.0, {"style": math.nan}),
    "returns too many numbers": returning([1.0] * 9),
    "returns a list with NaN": returning([math.nan] * 1),
    "hangs": lambda: threading.Event().wait(3),
    "state is a lock": threading.Lock,
    "state is a generator": lambda: (n for n in range(3)),
    "state is a function": lambda: lambda: 1,
}


def reward_environment(fault: str) -> SingleTurn:
    return SingleTurn(FaultyReward(fault))


def constraints_environment(fault: str) -> SingleTurn:
    return SingleTurn(Constraints({"ill": FaultyReward(fault)}))


class EveryThird:
    """A world of a real run: every third episode has the next fault of a list, in the place that belongs to it."""

    def __init__(self, faults: list[list[str]]):
        self.faults, self.episodes, self.met = faults, 0, []

    def reset(self, example):
        self.episodes += 1
        state = {"turns": 0, "place": None, "fault": None}
        if self.episodes % 3 == 0:
            state["place"], state["fault"] = self.faults[len(self.met) % len(self.faults)]
            self.met.append(state["fault"])
            if state["place"] == "reset":
                return FAULTS[state["fault"]]()
        return state

    def step(self, state, turn, *, truncated):
        state["turns"] += 1
        if state["place"] in ("step", "end"):
            return FAULTS[state["fault"]]()
        return EnvStep([], float(len(set(turn["content"].split())) % 2), True)
