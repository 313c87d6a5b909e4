"""Find the longest common beginning of two sequences."""

from collections.abc import Sequence


def common_prefix_length(first: Sequence, second: Sequence) -> int:
    """Return how many items both sequences begin with.

    Slices are compared, halving the part that is left, because Python compares slices faster than item by item.
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
