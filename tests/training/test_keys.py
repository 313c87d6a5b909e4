"""Test the table of config keys: it agrees with the recipes, and checks, defaults, page and command follow from it."""

import importlib
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pidistill.commands.keys import main as keys_command
from pidistill.errors import InputError
from pidistill.training.keys import (
    COMMON_KEYS,
    EVALUATION_KEYS,
    EVERY,
    NUMBER,
    ROUND_KEYS,
    TABLE,
    check_values,
    keys_of,
    page,
    rows,
    setting,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("recipe", EVERY)
def test_a_recipe_takes_the_keys_that_the_table_gives_it_and_requires_some_of_them(recipe):
    module = importlib.import_module(f"recipes.{recipe}_distributed")
    assert module.KEYS == keys_of(recipe) >= set(module.REQUIRED)
    assert all(TABLE[key].default is None for key in module.REQUIRED), "a key that is required needs no default"


def test_the_sets_of_keys_lie_inside_each_other():
    assert EVALUATION_KEYS < COMMON_KEYS and not COMMON_KEYS & ROUND_KEYS
    assert keys_of("pi_distill") == COMMON_KEYS | ROUND_KEYS
    assert keys_of("opsd") - keys_of("pi_distill") == {"hindsight", "refill"}


def test_the_page_is_what_the_table_says(capsys):
    keys_command(["--markdown"])
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == capsys.readouterr().out == page()
    assert all(f"| `{key}` |" in page() for key in TABLE)


def test_the_command_prints_the_rows_that_contain_a_word(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    keys_command(["ROLLOUT_LOG"])
    out = capsys.readouterr().out
    assert out.count("rollout_log_") == 6 and "group_size" not in out
    with pytest.raises(SystemExit) as ended:
        keys_command(["nosuchword"])
    assert ended.value.code == 2 and "no row of the config keys contains 'nosuchword'" in capsys.readouterr().err


def test_a_setting_is_the_default_where_the_config_has_none_or_null():
    cfg = OmegaConf.create({"eval_samples": None, "sft_batch_size": 3, "rollout_log_steps": 0, "compile": False})
    assert [setting(cfg, key) for key in ("eval_samples", "sft_batch_size", "rollout_log_steps", "compile")] == [1, 3, 0, False]
    assert setting(cfg, "fsdp_reshard_after_forward") is True and setting(cfg, "max_turns") is None
    with pytest.raises(KeyError):
        setting(cfg, "eval_sample")


def test_every_default_is_a_value_that_the_table_allows():
    check_values(OmegaConf.create({key.name: key.default for key in TABLE.values()}))


@pytest.mark.parametrize("key", [key.name for key in TABLE.values() if key.kind == NUMBER])
def test_a_number_is_refused_as_text_nan_and_minus_infinity(key):
    for value in ("fast", math.nan, -math.inf, True, [1], {"a": 1}):
        with pytest.raises(InputError, match=f"{key}=.* must be a "):
            check_values(OmegaConf.create({key: value}))
    wrong = OmegaConf.create({key: math.inf})
    if TABLE[key].infinite:
        check_values(wrong)
    else:
        with pytest.raises(InputError, match=f"{key}=inf must be a "):
            check_values(wrong)


@pytest.mark.parametrize("columns, terminal", [("70", True), ("119", True), ("80", False), ("200", False)])
def test_a_narrow_terminal_and_a_pipe_show_a_block_per_key_with_whole_words(columns, terminal, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    keys_command(["group_size"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("group_size (whole number of at least 1") and all(len(line) <= int(columns) for line in lines)
    assert "    rollouts of each prompt" in lines
    words = " ".join(lines).split()
    assert all(word in words for row in rows(word="group_size") for word in " ".join((row[0], row[4])).split())


def test_a_wide_terminal_shows_a_table(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    keys_command(["eval_every"])
    out = capsys.readouterr().out
    assert "eval_every_steps" in out and "│" in out
