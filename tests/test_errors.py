"""Test that control characters of data and model text do not reach a terminal, and checks of what a config says."""

import logging
import sys
import unicodedata

import pytest

from pidistill.errors import InputError, check_share, escape_controls, escape_logs


@pytest.mark.parametrize("text", ["plain", "two\nlines\tand a tab", "größe → 模型", "👩‍👩‍👧 e\u0301"])
def test_text_without_controls_stays_as_it_is(text):
    assert escape_controls(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\rb", r"a\rb"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202egnp", r"\u202egnp"),
        ("\ud800", r"\ud800"),
    ],
)
def test_controls_are_written_as_escapes(text, shown):
    assert escape_controls(text) == shown


def test_no_control_character_of_unicode_is_left():
    every = "".join(map(chr, range(0x3000))) + "\ud800\udfff"
    left = [character for character in escape_controls(every) if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")]
    assert set(left) == {"\n", "\t"}
    escape_controls(every).encode("utf-8")


def test_logged_text_shows_control_characters_escaped(capsys):
    logger = logging.getLogger("tests.escaped")
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        escape_logs(logger)
        escape_logs(logger)  # a second call adds nothing
        logger.warning("the row %s\nis refused", "\x1b[2Jred\x07")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "the row \\x1b[2Jred\\x07\nis refused\n"
    assert len(handler.filters) == 1


@pytest.mark.parametrize(
    "interval, takes, refuses",
    [("[0, 1]", (0, 1), ()), ("(0, 1]", (1,), (0,)), ("[0, 1)", (0,), (1,)), ("(0, 1)", (), (0, 1))],
)
def test_a_share_lies_between_0_and_1_with_the_ends_that_its_brackets_hold(interval, takes, refuses):
    for value in (0.5, *takes, *map(float, takes)):
        check_share("a.key", value, "a share", interval)
    for value in (-0.1, 1.1, float("nan"), float("inf"), *refuses, *map(float, refuses)):
        with pytest.raises(InputError) as error:
            check_share("a.key", value, "a share", interval)
        assert str(error.value) == f"a.key={value} must lie in {interval}: a share"
