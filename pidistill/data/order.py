"""Order rows by a function of a position, so that resuming needs nothing else."""

import functools
import random

from pidistill.errors import InputError


def epoch_order(n: int, seed: int, start: int, count: int) -> list[int]:
    """Return the elements ``start`` ... ``start + count - 1`` of the endless sequence epoch 0, epoch 1, ...

    Each epoch is its own random permutation of ``range(n)``, seeded with ``seed`` and the epoch's number.
    """
    if n < 1:
        raise InputError("there are no rows to order; check the dataset and what was dropped from it")
    return [_permutation(n, seed, position // n)[position % n] for position in range(start, start + count)]


@functools.lru_cache(maxsize=4)  # a round may cross an epoch's end; a few datasets may be in use
def _permutation(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return tuple(order)
