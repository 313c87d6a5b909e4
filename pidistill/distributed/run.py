"""Hold where a recipe runs: device, ranks, sums over ranks, and seconds by phase."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pidistill.distributed.tensor_parallel import DATA, TENSOR, from_first
from pidistill.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """Hold where a recipe runs. ``rank`` and ``world_size`` count data-parallel ranks; sums and shares are over these.

    The ranks of a tensor-parallel group have the same work, and the same results.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    seed: int
    output_dir: Path
    mesh: DeviceMesh | None = None  # [data-parallel, tensor-parallel] ranks; None where `tensor_parallel_dim` is 1
    # Of what forward and backward multiply: copies of trained weights, and weights that are not trained. None is `dtype`, which
    # trained weights, their gradients and the optimizer's states have.
    compute_dtype: torch.dtype | None = None
    replicas: DeviceMesh | None = None  # [groups, processes of a group]; each group holds all shards; None is one group

    @property
    def forward_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.dtype

    @property
    def is_mixed(self) -> bool:
        """Return True in mixed precision: forwards multiply in another dtype than the one that weights are trained in."""
        return self.forward_dtype != self.dtype

    @property
    def is_main(self) -> bool:
        return self.rank == 0 and self.is_first

    @property
    def is_first(self) -> bool:
        """Return True on the rank that acts for its tensor-parallel group."""
        return self.mesh is None or self.mesh.get_local_rank(TENSOR) == 0

    @property
    def processes(self) -> int:
        return self.world_size if self.mesh is None else self.mesh.size()

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self.mesh[DATA].get_group()

    def once(self, ask: Callable[[], T]) -> T:
        """Call ``ask()`` on one rank of a tensor-parallel group, and give all of them its answer."""
        if self.mesh is None:
            return ask()
        return from_first(self.mesh.get_group(TENSOR), ask() if self.is_first else None)

    def sum(self, value: float | int) -> float:
        """Return the sum of a number over all ranks (float64)."""
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total, group=self._group)
        return total.item()

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """Return the sums over all ranks of numbers whose names may differ between ranks."""
        if self.world_size == 1:
            return dict(values)
        gathered = self.gather([values])
        names = dict.fromkeys(name for one in gathered for name in one)
        return {name: math.fsum(one.get(name, 0.0) for one in gathered) for name in names}

    def gather(self, items: list) -> list:
        """Return the items of all ranks, on every rank."""
        if self.world_size == 1:
            return items
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, items, group=self._group)
        return [item for one in gathered for item in one]

    def max(self, value: int) -> int:
        largest = torch.tensor(value, dtype=torch.long, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return int(largest.item())

    def from_main(self, ask: Callable[[], T]) -> T:
        """Return the first process's ``ask()`` on every process; an InputError there is raised on all of them."""
        if self.processes == 1:
            return ask()
        answer: list[Any] = [None]
        if self.is_main:
            try:
                answer = [(ask(), None)]
            except InputError as error:
                answer = [(None, str(error))]
        dist.broadcast_object_list(answer, src=0)
        value, sentence = answer[0]
        if sentence is not None:
            raise InputError(sentence)
        return value

    def max_of_processes(self, value: int) -> int:
        """Return the largest of a number over all processes, those of a tensor-parallel group included."""
        if self.processes == 1:
            return value
        largest = torch.tensor(value, dtype=torch.long, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def share(self, items: Sequence) -> list:
        """Return this rank's share of items that every rank holds in the same order."""
        return list(items[self.rank :: self.world_size])


def gather_of_all(items: list) -> list:
    """Return the items of all processes, for code without a :class:`Run`; those of a tensor-parallel group come repeated."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return items
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return [item for one in gathered for item in one]


# ---------------------------------------------------------------------------------------------- timing


class Timer:
    """Count seconds by phase. On CUDA each phase ends with a synchronisation, so that it gets all of its own time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds
