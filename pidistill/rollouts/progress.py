"""Show how far a round of sampling is: rows that have ended, tokens, tokens per second.

:func:`pidistill.rollouts.collect_rollouts` opens the bar, for a round, an evaluation and a probe alike, and samplers call
:func:`count`; the bar of a sampler that does not call it does not move. On a terminal it is a line that disappears when the
round ends, elsewhere a line of the log every half minute. tqdm's own `TQDM_DISABLE=1` switches it off.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist
from torchtune import utils
from tqdm import tqdm

log = utils.get_logger("INFO")

# Shorter rounds show nothing.
_FIRST_AFTER_S = 3.0
_REFRESH_S, _LINE_EVERY_S = 0.5, 30.0


class _Progress:
    def __init__(self, rows: int, title: str) -> None:
        self._title, self._total, self._rows, self._tokens = title, rows, 0, 0
        self._began = time.perf_counter()
        self._on_terminal = sys.stderr.isatty()
        self._next = self._began + (_FIRST_AFTER_S if self._on_terminal else _LINE_EVERY_S)
        self._bar: tqdm | None = None

    def count(self, tokens: int, rows: int) -> None:
        self._tokens += tokens
        self._rows += rows
        now = time.perf_counter()
        if now < self._next:
            return
        rate = f"{self._tokens:,} tokens, {self._tokens / (now - self._began):,.0f} tokens/s"
        self._next = now + (_REFRESH_S if self._on_terminal else _LINE_EVERY_S)
        if self._on_terminal:
            self._show(rate)
        else:
            log.info(f"{self._title}: {self._rows} of {self._total} rows, {rate}")

    def _show(self, rate: str) -> None:
        if self._bar is None:
            self._bar = tqdm(total=self._total, desc=self._title, unit="row", leave=False)
        self._bar.n = self._rows
        self._bar.set_postfix_str(rate, refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


_current: ContextVar[_Progress | None] = ContextVar("progress of sampling", default=None)


@contextmanager
def sampling_progress(rows: int, title: str) -> Iterator[None]:
    """Show the numbers that :func:`count` gets inside the `with`, on the first process."""
    off = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    if off or not rows or (dist.is_initialized() and dist.get_rank() > 0):
        yield
        return
    progress = _Progress(rows, title)
    token = _current.set(progress)
    try:
        yield
    finally:
        _current.reset(token)
        progress.close()


def count(tokens: int = 0, rows: int = 0) -> None:
    """Add sampled tokens, and rows that have ended."""
    if (progress := _current.get()) is not None:
        progress.count(tokens, rows)
