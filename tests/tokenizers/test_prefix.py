"""Test the longest common prefix beside the plain loop."""

import random

from pidistill.tokenizers.prefix import common_prefix_length


def plain(first, second) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def test_the_length_is_that_of_the_plain_loop_for_lists_tuples_and_texts():
    draw = random.Random(0)
    for _ in range(300):
        shared = [draw.randrange(3) for _ in range(draw.randrange(9))]
        first, second = (shared + [draw.randrange(3) for _ in range(draw.randrange(9))] for _ in range(2))
        assert common_prefix_length(first, second) == plain(first, second)
        assert common_prefix_length(tuple(first), tuple(second)) == plain(first, second)
        texts = ["".join(map(str, items)) for items in (first, second)]
        assert common_prefix_length(*texts) == plain(first, second)
    assert common_prefix_length([], [1]) == 0 and common_prefix_length([1], [1]) == 1
