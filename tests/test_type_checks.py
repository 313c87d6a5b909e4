"""Test the checker of tests/__init__.py: it finds wrong shapes, wrong types and wrong fields in calls of the package."""

import pytest
import torch

from pidistill.chat.messages import message_text
from pidistill.losses.estimators import k1
from pidistill.types import PromptPair
from tests import has_shapes


def test_two_tensors_of_different_lengths_are_refused_where_one_name_stands_for_both():
    k1(torch.zeros(3), torch.zeros(3))
    with pytest.raises(TypeError):
        k1(torch.zeros(3), torch.zeros(4))


def test_a_wrong_type_is_refused_where_annotations_have_no_shapes():
    assert message_text({"role": "user", "content": "x"}) == "x"
    with pytest.raises(TypeError, match="message_text"):
        message_text(3)


def test_a_wrong_field_of_a_dataclass_is_refused():
    PromptPair([1], [2], True)
    with pytest.raises(TypeError):
        PromptPair([1], "2", True)


def test_shapes_are_found_inside_other_annotations():
    tensor = next(iter(k1.__annotations__.values()))
    assert has_shapes(tensor) and has_shapes(tensor | None) and has_shapes(dict[str, tuple[tensor, int]])
    assert has_shapes("Tensor") and not has_shapes(dict[str, int] | None)
