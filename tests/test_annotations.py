"""Test which plain YAML values an argument of a type accepts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from pidistill.annotations import accepts, demanded
from pidistill.types import Example

COMPONENT = {"_component_": "a.B"}


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [3], [True, 2.0, "3", None, [3], {}, COMPONENT]),
        (float, [3, 2.5], [True, "3", None, [3], {}, COMPONENT]),
        (bool, [True], [1, "true", None]),
        (str, ["a"], [1, None, ["a"], {"a": 1}, COMPONENT]),
        (Path, ["a"], [1]),
        (int | None, [3, None], [2.5, "3"]),
        (float | torch.Tensor, [1.0], ["fast", [1], None]),
        (Literal["a", 1], ["a", 1], ["b", True, None]),
        (Sequence[int], [[1], []], ["12", 1, [1, "2"], {"a": 1}]),
        (list[str], [["a"]], ["a", [1]]),
        (tuple[float, float], [[0.9, 1]], [0.9, ["a", "b"]]),
        (Mapping[str, int], [{"a": 1}], [[1], "a", 3]),
        (dict | float, [{"a": 1}, 2.0], ["a", None]),
        (Example, [COMPONENT], [3, "text", [1], {"a": 1}, None]),
        (torch.dtype, ["bf16", COMPONENT], [3, [1], None]),
        (Callable[[str], int], [COMPONENT, "a.function"], [3, [1]]),
        (Any, [3, "a", None, [1], {}], []),
        (object, [3, "a", None], []),
    ],
    ids=str,
)
def test_accepts_what_the_annotation_allows_and_nothing_else(hint, right, wrong):
    assert [value for value in right if not accepts(hint, value, "_component_")] == []
    assert [value for value in wrong if accepts(hint, value, "_component_")] == []


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (float | torch.Tensor, "a number"),
        (int | None, "a whole number or null"),
        (Literal["a", "b"], "a or b"),
        (Sequence[int], "a list of whole numbers"),
        (list[str], "a list"),
        (Mapping[str, int], "a mapping"),
        (Example, "a component (Example)"),
        (Callable[[str], int], "a component or the dotted path of a function"),
    ],
    ids=str,
)
def test_the_demand_is_said_in_words(hint, words):
    assert demanded(hint) == words
