"""Test the reward that looks for the reference in the answer."""

import pytest

from pidistill.errors import InputError
from pidistill.rewards import Contains
from pidistill.types import Example


def example(reference):
    return Example("row 4", [{"role": "user", "content": "q"}], reference=reference)


def said(text):
    return [
        {"role": "assistant", "content": "port averil"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": text},
    ]


@pytest.mark.parametrize(
    "reference, text, expected",
    [
        ("Port Averil", "She lives in Port Averil.", 1.0),
        ("Port Averil", "She lives in PORT AVERIL!", 1.0),
        ("Port Averil", "She lives in Port\nAveril.", 0.0),
        ("1951", "born in 1951, I think", 1.0),
        ("1951", "born in 19512", 0.0),
        ("owl", "a fowl", 0.0),
        ("owl", "owls", 0.0),
        ("C++", "in C++.", 1.0),
        ("a.b", "axb", 0.0),
        (7, "7", 1.0),
        (7.0, "7", 1.0),  # a table whose column has an empty cell holds its whole numbers so
        (7.5, "it is 7.5", 1.0),
        ("x", "", 0.0),
    ],
)
def test_the_reference_counts_as_whole_words_of_the_last_answer(reference, text, expected):
    assert Contains()(example(reference), said(text)) == expected


def test_the_case_of_letters_counts_where_casefold_is_off():
    assert Contains(casefold=False)(example("Merlin"), said("merlin")) == 0.0
    assert Contains(casefold=False)(example("Merlin"), said("Merlin")) == 1.0


def test_a_row_without_reference_is_refused():
    with pytest.raises(InputError, match="row 4 has no reference"):
        Contains()(example(None), said("x"))
