"""Test hints that the model writes itself: which are kept, what a sentence is, and how they are read back."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pidistill.data import hint_prompts, trace_dataset
from pidistill.errors import InputError
from pidistill.privileged.hint_file import read_hints
from pidistill.rollouts.hints import Hints, SentenceCount
from pidistill.rollouts.selections import Selection, trace_row
from pidistill.types import Example, PromptPair, Rollout
from tests.support.traces import BOOK, BYE, LOOK, episode, trace_writer


@pytest.fixture
def write(tmp_path):
    return trace_writer(tmp_path)


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def no_rewriting(cuts):
    raise AssertionError("nothing is rewritten")


def rollout(text: str, group: int, reward: float = 1.0, **changes) -> Rollout:
    row = Example(f"row {group}", [], data={"task": f"t{group}", "trace": SimpleNamespace(id=f"trace of {group}")})
    made = Rollout(row, PromptPair([], [], False), [1], [True], [0.0], "student", group, "done", said(text), reward)
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0),
        ("no end", 0),
        ("One.", 1),
        ("Pay 1.5 dollars for v2.0.", 1),
        ('First look! Then book?\nThen "stop."', 3),
        ("Is it so?! Yes.", 2),
        ("A. B. C. D.", 4),
    ],
)
def test_sentences_are_counted(text, sentences):
    for low in range(1, 5):
        for high in range(low, 5):
            reward = SentenceCount(low, high)(Example("row", []), said(text))
            assert reward == float(low <= sentences <= high)


def test_bounds_that_no_text_can_meet_are_refused():
    for low, high in ((0, 2), (3, 2)):
        with pytest.raises(InputError, match=f"reward.low={low} and reward.high={high}"):
            SentenceCount(low, high)


def test_the_first_usable_hint_of_each_prompt_is_kept_with_its_trace():
    rollouts = [
        rollout("too bad", 0, reward=0.5),
        rollout("cut", 0, stop_reason="length"),
        rollout("  ", 0),
        rollout("Look first.", 0),
        rollout("Later one.", 0),
        rollout("nothing", 1, reward=0.0),
        rollout("Book it.", 2),
    ]
    selection = Hints()
    assert isinstance(selection, Selection)
    traces = selection.select(rollouts, (), no_rewriting, 0).traces
    assert [(t.group, t.completion[0]["content"], t.provenance) for t in traces] == [
        (0, "Look first.", {"sampled_by": "student", "task": "t0", "trace": "trace of 0"}),
        (2, "Book it.", {"sampled_by": "student", "task": "t2", "trace": "trace of 2"}),
    ]
    with pytest.raises(InputError, match="row 0 is no prompt for a hint; set dataset._component_"):
        selection.select([replace(rollouts[3], example=Example("row 0", []))], (), no_rewriting, 0)


def test_the_first_hint_of_each_task_is_read_back(tmp_path):
    rollouts = [rollout(" Look. ", 0), rollout("<think>\nWhat?\n</think>\n\nBook.", 1)]
    rows = [trace_row(t, {"seed": 3}) for t in Hints().select(rollouts, (), no_rewriting, 0).traces]
    rows.append(rows[0] | {"completion": said("Other.")})
    (tmp_path / "hints.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_hints(str(tmp_path / "hints.jsonl")) == {"t0": "Look.", "t1": "Book."}


@pytest.mark.parametrize(
    "line", ["{", "3", '{"completion": []}', '{"provenance": {"task": 1}}', '{"provenance": {}, "completion": [1]}']
)
def test_other_files_are_refused(line, tmp_path):
    (tmp_path / "hints.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="hints.jsonl (cannot be read .line 1 is not valid|line 1 is not a hint with its)"):
        read_hints(str(tmp_path / "hints.jsonl"))


def test_prompts_hold_the_shortest_successful_trace_of_each_task(write):
    source = write(episode(1, 1.0, *LOOK, *BOOK, *BYE), episode(1, 1.0, *BOOK, *BYE), episode(2, 0.0, *BOOK, *BYE))
    (row,) = prompts = hint_prompts(source)
    assert prompts.dropped == {"task_without_success": 1} and row.data["task"] == "1" and row.data["trace"].id.endswith("row 1")
    (message,) = row.messages
    assert message["role"] == "user" and row.privileged is None
    assert 'assistant: book({"flight": "F1", "seats": 2})\ntool book: done\nassistant: It is booked.' in message["content"]
    assert "look(" not in message["content"] and "You are an agent" not in message["content"]
    assert hint_prompts(source, template="{conversation}!")[0].messages[0]["content"].endswith("It is booked.!")
    with pytest.raises(InputError, match="dataset.template has the unknown placeholder {trace}; write {conversation}"):
        hint_prompts(source, template="{trace}")


def test_hints_of_other_tasks_are_refused(write, tmp_path):
    source = write(episode(1, 1.0, *BOOK, *BYE))
    (tmp_path / "hints.jsonl").write_text(json.dumps({"provenance": {"task": "7"}, "completion": said("Look.")}) + "\n")
    with pytest.raises(InputError, match="has hints for none of the tasks"):
        trace_dataset(source, "hints", hints=str(tmp_path / "hints.jsonl"))
