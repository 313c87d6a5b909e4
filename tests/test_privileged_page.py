"""Test that docs/privileged.md lists every kind of privileged information, and that the files it names exist."""

import re
from pathlib import Path

import pytest

from pidistill.components import resolve
from pidistill.privileged.prompt import CONTROLS
from pidistill.privileged.trace_kinds import KINDS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "privileged.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"none"}))
def test_each_kind_of_trace_information_has_a_row(kind):
    assert f"`dataset.kind: {kind}`" in PAGE


@pytest.mark.parametrize("control", [control for control in CONTROLS if control])
def test_each_control_has_a_row(control):
    assert f"`privileged.control: {control}`" in PAGE


def test_every_file_and_component_that_the_page_names_exists():
    files = re.findall(r"`((?:pidistill|configs)/[\w/.]+\.(?:py|yaml))`", PAGE)
    components = re.findall(r"`(pidistill(?:\.\w+)+)`", PAGE)
    assert len(files) > 5 and len(components) > 5
    assert [name for name in files if not (ROOT / name).is_file()] == []
    for component in components:
        resolve(component)
