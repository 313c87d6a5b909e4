"""Show how far the loading or saving of weights is: a line on the terminal of the first process, where it takes seconds."""

from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from tqdm import tqdm

_FIRST_AFTER_S = 3.0
T = TypeVar("T")


def show_weights(items: Collection[T], title: str, unit: str) -> Iterator[T]:
    """Yield the items, and show how many are done; a log file gets no line."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    yield from tqdm(items, desc=title, unit=unit, leave=False, delay=_FIRST_AFTER_S, disable=None if first else True)


class PlacedWeights(dict[str, Any]):
    """Show how many of its weights are taken, for a function that takes all of them without showing progress."""

    def items(self) -> Any:
        return show_weights(super().items(), "placing weights", "tensor")
