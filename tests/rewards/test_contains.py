"""Test the reward that looks for the reference in the answer."""

from dataclasses import replace

import pytest

from pidistill.errors import InputError
from pidistill.rewards import Contains, ExactMatch, GSM8KReward
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
        (7, "It is 7.", 1.0),
        (7, "It is 7.5.", 0.0),
        (7, "7.5kg", 0.0),
        ("17", "17,000", 0.0),
        ("17,000", "17,000 or so", 1.0),
        (5, "2,3,5", 1.0),
        (5, "it is -5", 0.0),
        (-5, "it is −5 degrees", 1.0),
        (5, "3-5", 1.0),  # a range
        (19, "COVID-19", 1.0),
        (1951, "on 12.05.1951", 1.0),
        (7, "the 7th", 0.0),
        (5, "v1.5", 0.0),
        ("$5", "It costs $5,000.", 0.0),
        ("$5", "It costs $5.75.", 0.0),
        ("$5", "It costs $5.", 1.0),
        ("$5", "-$5", 0.0),
        ("$5", "a loss of -$5", 0.0),
        ("$5", "$3-$5", 1.0),
        ("50%", "2.50%", 0.0),
        ("5%", "about 12.5% of it", 0.0),
        ("5%", "about 5% of it", 1.0),
        ("5 km", "12.5 km", 0.0),
        ("5 km", "5 km away", 1.0),
        ("5 km", "5 kmh", 0.0),
        ("250 euros", "1,250 euros", 0.0),
        ("1,250 euros", "1250 Euros", 1.0),
        ("5 °C", "-5 °C", 0.0),
        ("5 °C", "3-5 °C", 1.0),
        ("-5 °C", "−5 °C", 1.0),
        ("Apollo 11", "Apollo 11.", 1.0),
        ("Apollo 11", "Apollo 11,000", 0.0),
        ("7th", "the 17th", 0.0),
        ("2/3", "12/3", 0.0),
        ("12.05.1951", "born on 12.05.1951.", 1.0),
        ("between 5 and 10", "between 5.0 and 10", 1.0),
        ("1000", "It is 1,000.", 1.0),
        ("1,000", "It is 1000.", 1.0),
        ("7.5", "7.50", 1.0),
        ("7.50", "7.5", 1.0),
        ("0.5", ".5", 1.0),
        (5, "It is .5", 0.0),
        ("007", "agent 7", 0.0),
        ("100", "100.00", 1.0),
        ("100", "1", 0.0),
        ("北京", "首都是北京。", 1.0),
        ("3个", "有13个", 0.0),
        ("3个", "有3个人", 1.0),
        ("東京", "答えは東京です", 1.0),
        ("Paris", "首都是Paris。", 1.0),
        ("3", "有3个", 1.0),
        ("서울", "수도는 서울이다", 1.0),
        ("owl", "a fowl 鳥", 0.0),
        ("x", "", 0.0),
        ("192.168.0.1", "The gateway is 192.168.0.1.", 1.0),
        ("192.168.0.1", "The gateway is 192.168.0.10.", 0.0),
        ("10.0.0.1", "10.0.0.100", 0.0),
        ("1.2.3", "1.2.30", 0.0),
        ("1.20.3", "1.2.3", 0.0),
        ("1.2.3", "version 1.2.3", 1.0),
        ("v1.10", "Use v1.1", 0.0),
        ("v1.1", "Use v1.10", 0.0),
        ("v1.10", "Use V1.10.", 1.0),
        ("3.10rc1", "3.1rc1", 0.0),
        ("7.5kg", "7.50kg", 1.0),
        ("1,000m", "1000m", 1.0),
        ("USD1,000", "USD1000", 1.0),
        ("It is 7.50.", "It is 7.5.", 1.0),
        ("caf\u00e9", "a cafe\u0301", 1.0),
        ("cafe\u0301", "a caf\u00e9", 1.0),
        ("cafe", "a cafe\u0301", 0.0),
    ],
)
def test_the_reference_counts_as_whole_words_of_the_last_answer(reference, text, expected):
    assert Contains()(example(reference), said(text)) == expected


def test_the_case_of_letters_counts_where_casefold_is_off():
    assert Contains(casefold=False)(example("Merlin"), said("merlin")) == 0.0
    assert Contains(casefold=False)(example("Merlin"), said("Merlin")) == 1.0


def test_an_amount_behind_the_letters_of_a_currency_is_compared_as_a_number():
    for wanted, text in (("Rs500.00", "It costs Rs500."), ("USD5.50", "It costs USD5.5")):
        assert Contains()(example(wanted), said(text)) == 1.0
    assert Contains()(example("v1.10"), said("Use v1.1")) == 0.0


def test_a_row_without_reference_is_refused():
    with pytest.raises(InputError, match="row 4 has no reference"):
        Contains()(example(None), said("x"))


@pytest.mark.parametrize(
    "text", ["<think>\nParis or Rome?\n</think>\n\nIt is Rome.", "Paris?\n</think>\nRome", "<think>Paris, I think"]
)
def test_reasoning_is_no_part_of_the_answer(text):
    assert Contains()(example("Paris"), said(text)) == 0.0
    assert GSM8KReward()(example("72"), said(text.replace("Paris", "\\boxed{72}").replace("Rome", "75"))) == 0.0
    assert ExactMatch()(example("Paris"), said("<think>Rome?</think>\n\nParis")) == 1.0


PERSON = {"others": ["Port Averil", 1974]}


@pytest.mark.parametrize(
    "text, data, expected",
    [
        ("She is a violinist.", PERSON, 1.0),
        ("A violinist who lives in port averil.", PERSON, 0.0),
        ("A violinist, born in 1974.", PERSON, 0.0),
        ("A violinist of 19745 concerts in Averil.", PERSON, 1.0),
        ("She lives in Port Averil.", PERSON, 0.0),
        ("A violinist and a cat.", {"others": "cat"}, 0.0),
        ("A violinist and a cat.", {"others": None}, 1.0),
        ("A violinist and a cat.", {"others": []}, 1.0),
    ],
)
def test_an_answer_that_says_what_is_unwanted_is_wrong(text, data, expected):
    row = replace(example("violinist"), data=data)
    reward = Contains(unwanted_key="others")
    reward.check_reference(row)
    assert reward(row, said(text)) == expected
    assert Contains()(row, said(text)) == float("violinist" in text)


@pytest.mark.parametrize(
    "data, words",
    [
        ({"fact": 1}, "row 4 has no column 'others', which the reward's unwanted_key names; it has fact;"),
        ({}, "it has no further columns"),
        ({"others": ["dog", ""]}, r"the column 'others' holds \['dog', ''\]"),
        ({"others": {"a": 1}}, "the column 'others' holds"),
        ({"others": [True, 1.5]}, "the column 'others' holds"),
        ({"others": ["the dog", "violinist"]}, "contains the unwanted 'violinist' too, so that no answer is right"),
    ],
)
def test_a_row_whose_unwanted_texts_cannot_be_used_is_refused(data, words):
    with pytest.raises(InputError, match=words):
        Contains(unwanted_key="others").check_reference(replace(example("violinist"), data=data))
