"""Test docs/environments.md: its environment plays, its configs name what exists, and it lists what is counted."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from omegaconf import OmegaConf

from pidistill.config import check_config
from pidistill.envs import Environment
from pidistill.rollouts import DROP_REASONS
from pidistill.training.keys import COMMON_KEYS
from tests.support.episodes import LetterTokenizer, Script, collect_rollouts
from tests.support.episodes import pair as prompt_pair

TEXT = (Path(__file__).parents[2] / "docs" / "environments.md").read_text(encoding="utf-8")


@pytest.fixture
def mine(monkeypatch):
    """The page's Python, as the module it says it is."""
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    exec(compile(code, "mine.py", "exec"), module.__dict__)
    return module


def test_the_environment_of_the_page_plays(mine):
    environment = mine.HigherLower(guesses=3)
    assert isinstance(environment, Environment)
    rows = list(mine.higher_lower_dataset(3, seed=5))
    assert rows == list(mine.higher_lower_dataset(3, seed=5)) and len({row.data["number"] for row in rows}) > 1
    numbers = [row.data["number"] for row in rows]
    assert [row.privileged for row in rows] == [f"The number is {number}." for number in numbers]
    scripts = (f"a {numbers[0]}.", "1.20.hm.", f"0.21.is it {numbers[2]}.")
    pairs = [prompt_pair(name) for name in "abc"]
    limits = {"view": "student", "group_size": 1, "seeds": [0, 1, 2], "environment_timeout_s": 60}
    result = collect_rollouts(None, Script(*scripts), LetterTokenizer(), environment, rows, pairs, **limits)
    assert [rollout.reward for rollout in result.rollouts] == [1.0, 0.0, 1.0]
    hints = [[turn["content"] for turn in rollout.turns if turn["role"] == "user"] for rollout in result.rollouts]
    assert hints[0] == [] and hints[2] == ["higher", "lower"]


def test_the_configs_of_the_page_name_parts_and_keys_that_exist(mine):
    configs = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    mine.next_action = lambda state: None
    assert len(configs) == 5
    for config in configs:
        check_config(OmegaConf.create(yaml.safe_load(config)), COMMON_KEYS)


def test_the_page_lists_every_reason():
    assert re.findall(r"^\| `(\w+)` \| (?=`reset`|the |no )", TEXT, re.MULTILINE) == list(DROP_REASONS)
