"""Test that calls between tags of one's own are found wherever `action_tags` names the tags."""

import pytest

from pidistill.data import trace_dataset
from pidistill.data.agent_traces import read_traces
from pidistill.envs import ReplayEnvironment
from pidistill.errors import InputError
from pidistill.privileged.hindsight import SiblingToolCalls
from pidistill.types import Example, Message
from tests.support.traces import USER, episode, result, trace_writer

TAGS = ["call"]


def calling(arguments: str) -> Message:
    return {"role": "assistant", "content": f'I look. <call>{{"name": "look", "arguments": {arguments}}}</call>'}


TURNS = [calling('{"city": "SEA"}'), result("look", "F1"), {"role": "assistant", "content": "It is F1."}]
LINE = '1. look({"city": "SEA"})'


@pytest.fixture
def source(tmp_path) -> str:
    unreadable = {"role": "assistant", "content": "<call>look in SEA</call>"}
    return trace_writer(tmp_path)(episode(1, 1.0, *TURNS), episode(2, 0.0, unreadable), episode(3, 1.0, calling('"[SEA"')))


def test_a_trace_is_written_as_the_calls_between_the_tags_that_are_named(source, caplog):
    named, _, malformed = trace_dataset(source, action_tags=TAGS, header="")
    assert named.privileged == LINE and malformed.privileged == "1. look([SEA)"
    assert "1 of the 2 successful traces" in caplog.text and "row 2" in caplog.text
    assert read_traces(source, action_tags=TAGS).unreadable_calls == 1
    caplog.clear()
    with pytest.raises(InputError, match="2 of the 2 successful traces that are used have no call that is read"):
        trace_dataset(source, header="")
    assert not caplog.text
    assert read_traces(source).unreadable_calls == 0


def test_a_replay_compares_the_calls_between_the_tags_that_are_named(source):
    row = trace_dataset(source, action_tags=TAGS)[0]
    wrong = calling('{"city": "LAX"}')
    for tags, followed in (({"action_tags": TAGS}, False), ({}, True)):
        environment = ReplayEnvironment(**tags)
        assert answers(environment, row, TURNS[0]) == [TURNS[1]]
        assert (answers(environment, row, wrong) == [TURNS[1]]) is followed, "between other tags any text is no call"


def answers(environment: ReplayEnvironment, row: Example, turn: Message) -> list[Message]:
    return environment.step(environment.reset(row), turn, truncated=False).observations


def test_a_siblings_calls_are_those_between_the_tags_that_are_named():
    row = Example("row", [USER])
    assert SiblingToolCalls(header="", action_tags=TAGS)(row, TURNS) == LINE
    assert SiblingToolCalls(header="")(row, TURNS) is None
