"""Give each episode its own state of Python's and numpy's global random streams, for environments that draw from them."""

import contextlib
import random
import threading
from collections.abc import Iterator

import numpy as np

_LOCK = threading.RLock()  # a process has one set of streams, which one episode at a time uses


class RandomStreams:
    """Hold the states of an episode's random streams; its draws depend only on the seed and on its own earlier draws."""

    def __init__(self, seed: int) -> None:
        self.python = random.Random(seed).getstate()
        self.numpy = np.random.RandomState(seed % 2**32).get_state()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Make `random` and `numpy.random` draw from this episode's streams inside the block, and only there."""
        with _LOCK:
            before = random.getstate(), np.random.get_state()
            random.setstate(self.python)
            np.random.set_state(self.numpy)
            try:
                yield
            finally:
                self.python, self.numpy = random.getstate(), np.random.get_state()
                random.setstate(before[0])
                np.random.set_state(before[1])
