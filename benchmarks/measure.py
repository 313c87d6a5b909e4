"""What the benchmarks share: seconds by turns, peak memory of a process, the machine's matmul rate, and one table.

A machine's speed drifts, so contenders take turns in one process and the ratio is taken turn by turn; memory is measured in a
process per contender, since a heap that one has grown hides what the next one needs.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

GIB = 2**30


def by_turns(
    contenders: Mapping[str, Callable[[], Any]],
    turns: int,
    device: torch.device,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender in each turn: A B C A B C …, after one turn that is not counted (the caller's, without it).

    On one thread of a machine that others use too, ``time.process_time`` counts this process's own seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(0 if warm_up else 1, turns + 1):
        for name, run in contenders.items():
            synchronize(device)
            begin = clock()
            run()
            synchronize(device)
            if turn:
                seconds[name].append(clock() - begin)
    return seconds


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over turns of slow / fast: how many times faster the second one is."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops_per_s(
    device: torch.device,
    dtype: torch.dtype,
    size: int | None = None,
    seconds: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The rate of a large square matmul: what a floor in FLOPs is divided by."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    synchronize(device)
    begin, done = clock(), 0
    while (elapsed := clock() - begin) < seconds:
        for _ in range(8):
            a @ b
        synchronize(device)
        done += 8
    return done * 2 * size**3 / elapsed


class PeakMemory:
    """Peak memory inside the `with`, above what was held on entry: ``bytes`` afterwards.

    On CPU the process's resident memory, looked at every millisecond; on CUDA the allocator's own peak.
    """

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self._device = device

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return self
        self._start = self._peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._start
            return
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._peak, _resident()) - self._start

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_own_process(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON object that ``python script arguments`` prints on its last line."""
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
