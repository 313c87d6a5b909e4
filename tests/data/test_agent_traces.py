"""Test recorded agent episodes as examples: which trace of a task, what the teacher sees of it, and real τ-bench traces."""

import json
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pidistill.chat.calls import ToolCall
from pidistill.chat.phrases import count_phrases
from pidistill.data import build_prompts, demonstration, trace_dataset, trace_leak_phrases
from pidistill.data.agent_traces import derived_tools, read_traces
from pidistill.errors import InputError
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.privileged.trace_kinds import KINDS
from pidistill.privileged.trace_task import AgentTrace, TraceTask
from pidistill.tokenizers import HFChatTokenizer
from tests.support.tiny_tokenizers import qwen_folder
from tests.support.traces import BOOK, BYE, LOOK, SYSTEM, USER, call, episode, result, trace_writer

DATA = os.environ.get("PIDISTILL_TEST_DATA")
REAL = Path(DATA or ".") / "tau_bench_airline_gpt4o.jsonl"
needs_data = pytest.mark.skipif(not REAL.is_file(), reason="PIDISTILL_TEST_DATA names no folder with the τ-bench traces")
SOLVED = ("calls", "call_names", "solution_prefix", "full")


@pytest.fixture
def write(tmp_path):
    return trace_writer(tmp_path)


# ------------------------------------------------------------------------------------------- which trace


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=6))
def test_the_source_is_the_shortest_success_and_the_first_of_equals(cases):
    said = {"role": "assistant", "content": "x"}
    traces = [AgentTrace(f"{i}", "t", [USER], [said] * n, 1.0, None, None, ok) for i, (n, ok) in enumerate(cases)]
    task = TraceTask("t", traces)
    expected = None
    for trace in traces:  # the slow way: a later one has to be shorter
        if trace.success and (expected is None or len(trace.turns) < len(expected.turns)):
            expected = trace
    assert task.source is expected
    assert task.shown is (expected or traces[0])


def test_one_example_per_task_and_every_other_row_is_counted(write):
    source = write(
        episode(5, 0.0, *BOOK, *BYE),
        episode(2, 1.0, *LOOK, *BOOK, *BYE),
        episode(5, 0.5, *LOOK),
        episode(2, 1.0, *BOOK, *BYE),
        {"task_id": 2, "reward": 1.0, "messages": [SYSTEM, USER]},
    )
    dataset = trace_dataset(source)
    assert [example.data["task"] for example in dataset] == ["5", "2"]
    assert dataset.dropped == {"other_trace_of_task": 2, "no_assistant_turn": 1}
    failed, solved = dataset
    assert failed.privileged is None and failed.completion is None and failed.id.endswith("row 0")
    assert solved.id.endswith("row 3") and solved.messages == [SYSTEM, USER]
    parsed = {"function": {"name": "book", "arguments": {"flight": "F1", "seats": 2}}}
    assert solved.completion == [{"role": "assistant", "content": "", "tool_calls": [parsed]}, BOOK[1], BYE[0]]
    lower = trace_dataset(source, success_threshold=0.5)
    assert [bool(example.privileged) for example in lower] == [True, True]
    dropped = trace_dataset(source, unsolved="drop")
    assert [example.data["task"] for example in dropped] == ["2"]
    assert dropped.dropped == {"other_trace_of_task": 1, "task_without_success": 2, "no_assistant_turn": 1}
    assert len(dropped) + sum(dropped.dropped.values()) == 5


def test_tasks_without_a_success_go_to_plain_rl_and_are_counted(write, tmp_path):
    source = write(episode(1, 1.0, *BOOK, *BYE), episode(2, 0.0, *BOOK, *BYE))
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path / "qwen")))
    prompts = build_prompts(trace_dataset(source), tokenizer, PrivilegedPrompt(), max_new_tokens=8)
    assert prompts.rows_without_pi == 1 and [pair.has_privileged for _, pair in prompts.prompts] == [True, False]
    (_, pair) = prompts.prompts[1]
    assert pair.student == pair.teacher


def test_a_greeting_before_the_user_speaks_is_part_of_the_prompt(write):
    greeting = {"role": "assistant", "content": "How can I help?"}
    row = {"task_id": 1, "reward": 1, "messages": [SYSTEM, greeting, USER, *BOOK, *BYE]}
    (example,) = trace_dataset(write(row))
    assert example.messages == [SYSTEM, greeting, USER] and example.completion[0]["tool_calls"]


def test_tasks_are_chosen_by_their_order(write):
    source = write(*[episode(i, 1.0, *BOOK, *BYE) for i in range(5)])
    halves = trace_dataset(source, max_tasks=3), trace_dataset(source, first_task=3)
    assert [[e.data["task"] for e in half] for half in halves] == [["0", "1", "2"], ["3", "4"]]
    assert halves[0].dropped == halves[1].dropped == {}
    with pytest.raises(InputError, match="first_task=5 and dataset.max_tasks=None leave none of the 5 tasks"):
        trace_dataset(source, first_task=5)


# ------------------------------------------------------------------------------------------- kinds


def text_of(source: str, kind: str, **arguments) -> str | None:
    (example,) = trace_dataset(source, kind, **arguments)
    return example.privileged


GOLD = [{"name": "book", "kwargs": {"flight": "F1"}}]


def test_each_kind_of_privileged_information_is_written_as_its_text(write):
    think = [call("think", thought="hm"), result("think", "")]
    source = write(episode(1, 1.0, *think, *LOOK, *BOOK, *BYE, task={"actions": GOLD}))
    body = {kind: text_of(source, kind, header="", omit_tools=["think"]) for kind in SOLVED}
    assert body["calls"] == '1. look({"city": "SEA"})\n2. book({"flight": "F1", "seats": 2})'
    assert body["call_names"] == "1. look\n2. book"
    assert body["solution_prefix"] == '1. look({"city": "SEA"})'
    assert body["full"] == (
        'assistant: think({"thought": "hm"})\ntool think: \nassistant: look({"city": "SEA"})\ntool look: found F1\n'
        'assistant: book({"flight": "F1", "seats": 2})\ntool book: done\nassistant: It is booked.'
    )
    assert text_of(source, "gold_actions", actions_key="task.actions", header="") == '1. book({"flight": "F1"})'
    assert text_of(source, "none") is None
    assert text_of(source, "calls", call_template="{name}", header="Do:", omit_tools=["look"]) == "Do:\nthink\nbook"
    assert text_of(source, "solution_prefix", prefix_calls=2, header="").count("\n") == 1
    assert text_of(source, "solution_prefix", prefix_frac=0.5, header="").count("\n") == 1, "half of three, rounded up, is two"


def test_calls_between_tags_are_calls_too(write):
    tagged = {"role": "assistant", "content": 'I look. <action>{"name": "look", "arguments": {"city": "SEA"}}</action>'}
    broken = {"role": "assistant", "content": "<action>look SEA</action>"}
    source = write(episode(1, 1.0, tagged, {"role": "user", "content": "F1"}, broken))
    assert text_of(source, "calls", header="") == '1. look({"city": "SEA"})'
    assert trace_dataset(source)[0].tools is None, "what is called between tags is described in the system prompt"
    assert read_traces(source).unreadable_calls == 1


def test_a_used_trace_whose_call_has_no_object_as_arguments_is_said(write, caplog):
    broken = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": '{"city": '}]}
    source = write(episode(1, 1.0, broken), episode(2, 0.0, broken), episode(3, 1.0, {"role": "assistant", "content": "No."}))
    trace_dataset(source)
    (said,) = [record.getMessage() for record in caplog.records if "no JSON object" in record.getMessage()]
    assert "1 of the 2 successful traces that are used" in said and "row 0" in said


def test_a_success_without_calls_is_information_and_a_failure_is_none(write):
    refusal = {"role": "assistant", "content": "I must not do that."}
    source = write(episode(1, 1.0, refusal), episode(2, 0.0, refusal, task={"actions": []}), episode(3, 1.0, *BOOK))
    for kind in ("calls", "call_names", "solution_prefix"):
        said, failed, _ = trace_dataset(source, kind, header="")
        assert (said.privileged, failed.privileged) == ("(no tool call)", None)
    said, failed, _ = trace_dataset(source, "gold_actions", actions_key="task.actions", header="")
    assert (said.privileged, failed.privileged) == (None, "(no tool call)")


def test_each_kinds_own_words_for_giving_it_away_are_leak_phrases():
    for kind in KINDS:
        phrases = trace_leak_phrases(kind, extra=["my notes"])
        assert "privileged" in phrases and phrases[-1] == "my notes"
        assert bool(count_phrases("I follow the provided actions.", phrases)) == (kind not in ("hints", "none"))
    assert count_phrases("As the provided hint says", trace_leak_phrases("hints")) > 0


def test_tools_come_from_the_row_or_a_file_or_the_calls_seen(write, tmp_path):
    schema = [{"type": "function", "function": {"name": "look"}}]
    row = episode(1, 1.0, *LOOK, *BOOK, *BYE, tools=json.dumps(schema))
    assert trace_dataset(write(row))[0].tools == schema
    (tmp_path / "tools.json").write_text(json.dumps(schema))
    assert trace_dataset(write(row), tools_file=str(tmp_path / "tools.json"))[0].tools == schema
    derived = trace_dataset(write(row, episode(2, 0.0, call("look", city="LAX", day=3))), tools_key=None)
    assert [tool["function"]["name"] for tool in derived[0].tools] == ["look", "book"]
    assert derived[0].tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"city": {"type": "string"}, "day": {"type": "integer"}},
        "required": ["city"],
    }
    assert trace_dataset(write(row), tools_key=None, derive_tools=False)[0].tools is None


XML_CALL = "<tool_call>\n<function=book>\n<parameter=city>\nSEA\n</parameter>\n</function>\n</tool_call>"
PYTHON_CALL = "<tool_call>\n{'arguments': {'city': 'SEA'}, 'name': 'book'}\n</tool_call>"


@pytest.mark.parametrize("text", [XML_CALL, PYTHON_CALL])
def test_calls_as_xml_and_as_python_writes_them_are_information(write, text):
    dataset = trace_dataset(write(episode(1, 1.0, {"role": "assistant", "content": text}, *BYE)))
    assert 'book({"city": "SEA"})' in dataset[0].privileged


def test_calls_that_cannot_be_read_are_never_told_as_no_call(write, caplog):
    unreadable = {"role": "assistant", "content": "<tool_call>book(city=SEA)</tool_call>"}
    with pytest.raises(InputError, match="none of its 1 calls between the tags action, tool_call can be read"):
        trace_dataset(write(episode(1, 1.0, unreadable, *BYE)))
    readable = {"role": "assistant", "content": XML_CALL}
    dataset = trace_dataset(write(episode(1, 1.0, unreadable, readable, *BYE)))
    assert "SEA" in dataset[0].privileged
    assert "1 of the 1 successful traces that are used have a call between tags that cannot be read" in caplog.text


SAID = {  # calls in forms that are unknown here
    "mini-swe-agent": "THOUGHT: look\n\n```bash\nls -la\n```",
    "ReAct": "Thought: x\nAction: search[Ulm]",
    "invoke": '<function_calls>\n<invoke name="book">\n</invoke>\n</function_calls>',
    "Mistral": '[TOOL_CALLS][{"name":"book","arguments":{}}]',
}


@pytest.mark.parametrize("text", SAID.values(), ids=SAID)
def test_traces_whose_calls_are_all_in_an_unknown_form_are_refused_for_kinds_made_of_calls(write, text):
    source = write(*[episode(i, 1.0, {"role": "assistant", "content": text}, USER, *BYE) for i in range(2)])
    said = "2 of the 2 successful traces that are used have no call that is read .first: traces.jsonl row 0, whose first turn "
    for kind in ("calls", "call_names", "solution_prefix"):
        begins = re.escape(repr(text[:12])[1:-1])
        with pytest.raises(
            InputError, match=rf"{said}begins .{begins}.*, so that kind {kind} says .*, or set dataset.kind: full"
        ):
            trace_dataset(source, kind)
    for kind in ("full", "none"):
        assert all(example.data["trace"].no_call_read for example in trace_dataset(source, kind))


def test_some_traces_without_calls_are_said_and_are_not_refused(write, caplog):
    refusal = {"role": "assistant", "content": "I must not do that."}
    source = write(episode(1, 1.0, *BOOK, *BYE), episode(2, 1.0, refusal), episode(3, 0.0, refusal))
    dataset = trace_dataset(source)
    (said,) = caplog.messages
    assert "1 of the 2 successful traces that are used have no call that is read (first: traces.jsonl row 1, whose" in said
    assert all(example.data["trace"].no_call_read is None for example in dataset)
    assert "(no tool call)" in trace_dataset(source, first_task=1)[0].privileged, "the form of the calls is known from row 0"


def test_xml_calls_without_tags_around_them_are_information(write):
    bare = {"role": "assistant", "content": "I look.\n<function=bash>\n<parameter=command>ls</parameter>\n</function>"}
    assert text_of(write(episode(1, 1.0, bare, *BYE)), "calls", header="") == '1. bash({"command": "ls"})'


@pytest.mark.parametrize("key", ["args", "input"])
def test_calls_as_programs_write_them_keep_their_arguments_in_traces_and_reference_actions(write, key):
    asked = {"name": "book", key: {"flight": "F1"}, "id": "c1", "type": "tool_call"}
    source = write(episode(1, 1.0, {"role": "assistant", "content": "", "tool_calls": [asked]}, *BYE, gold=[asked]))
    for kind, options in (("calls", {}), ("gold_actions", {"actions_key": "gold"})):
        assert text_of(source, kind, header="", **options) == '1. book({"flight": "F1"})'
    gold = [{"name": "book", "what": {"flight": "F1"}}]
    with pytest.raises(InputError, match=r"row 0: gold is no list of actions .*'what'.*set dataset.actions_key"):
        trace_dataset(write(episode(1, 1.0, *BOOK, gold=gold)), "gold_actions", actions_key="gold")


def test_a_leading_demonstration_is_in_the_prompt_and_the_episode_begins_at_the_real_task(write):
    demo = [{**message, "is_demo": True} for message in (USER, *LOOK, {"role": "assistant", "content": "Shown."})]
    task = {"role": "user", "content": "Now book F1."}
    row = {"task_id": 1, "reward": 1, "messages": [SYSTEM, *demo, task, *BOOK, *BYE]}
    (example,) = trace_dataset(write(row), header="")
    assert [message["content"] for message in example.messages][-2:] == ["Shown.", "Now book F1."]
    assert len(example.messages) == 6 and example.privileged == '1. book({"flight": "F1", "seats": 2})'
    assert len(example.completion) == 3 and not any(message.get("is_demo") for message in example.completion)


def test_rows_without_tools_get_derived_ones_also_beside_rows_that_have_tools(write):
    schema = [{"type": "function", "function": {"name": "look", "description": "Search."}}]
    told, untold = episode(1, 1.0, *LOOK, *BYE, tools=schema), episode(2, 1.0, *BOOK, *BYE)
    first, second = trace_dataset(write(told, untold))
    assert first.tools == schema and [tool["function"]["name"] for tool in second.tools] == ["book"]
    toolless = episode(2, 1.0, {"role": "assistant", "content": "No."})
    assert trace_dataset(write(told, toolless))[1].tools is None
    assert trace_dataset(write(told, untold), derive_tools=False)[1].tools is None


def test_tasks_that_share_an_id_are_said_and_each_row_may_be_a_task_of_its_own(write, caplog):
    other = {"role": "user", "content": "Cancel order 77."}
    rows = [episode(0, 1.0, *BOOK), episode(1, 1.0, *BOOK), episode(1, 1.0, *BOOK), episode(0, 1.0, *LOOK)]
    rows[3]["messages"][1] = other
    source = write(*rows)
    assert len(trace_dataset(source)) == 2
    (said,) = caplog.messages
    assert "1 of the 2 values of task_id have prompts with several last user messages (first: 0)" in said
    caplog.clear()
    apart = trace_dataset(source, task_key=None)
    assert [example.data["task"] for example in apart] == [example.id for example in apart] and len(apart) == 4
    assert not caplog.records and apart.dropped == {}


def test_derived_tools_have_the_types_of_all_arguments_seen():
    calls = [ToolCall("f", {"a": 1, "b": True, "c": [1], "d": {}, "e": None}), ToolCall("f", {"a": 1.5, "b": "x"})]
    properties = derived_tools(calls)[0]["function"]["parameters"]["properties"]
    assert {name: value["type"] for name, value in properties.items()} == {
        "a": "number", "b": ["boolean", "string"], "c": "array", "d": "object", "e": "null",
    }  # fmt: skip


def test_json_rows_are_read_as_they_were_written(write):
    """A table would give every call the arguments of all others, as nulls, in one order."""
    objects = [{"role": "assistant", "tool_calls": [{"function": {"name": n, "arguments": a}}]} for n, a in
               (("look", {"z": 2, "a": 1}), ("book", {"flight": "F1"}))]  # fmt: skip
    rows = [episode(1, 1.0, objects[0], result("look", "F1"), objects[1])]
    for name in ("traces.json", "traces.jsonl"):
        assert text_of(write(*rows, name=name), "calls", header="") == '1. look({"z": 2, "a": 1})\n2. book({"flight": "F1"})'


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "call"}, "dataset.kind=call is unknown; choose one of calls, call_names"),
        ({"kind": "gold_actions"}, "no row of .* has reference actions; set dataset.actions_key"),
        ({"kind": "hints"}, "set dataset.hints with kind: hints"),
        ({"hints": "somewhere"}, "set dataset.hints with kind: hints"),
        (
            {"kind": "hints", "hints": "gone.jsonl"},
            "gone.jsonl does not exist; it is written by the stage before: run `tune run",
        ),
        ({"prefix_frac": 0.0}, "dataset.prefix_frac=0.0"),
        ({"prefix_calls": 0}, "dataset.prefix_calls=0 must"),
        ({"messages_key": "traj"}, "no column 'traj' with values"),
        ({"task_key": "reward", "reward_key": "task_id", "unsolved": "skip"}, "dataset.unsolved=skip is unknown"),
        ({"success_threshold": 2.0, "unsolved": "drop"}, "none of the 1 tasks of .* has a trace with reward ≥ 2.0"),
        ({"reward_key": "messages"}, "row 0: messages is .*, not a number; set dataset.reward_key"),
        (
            {"reward_key": "score"},
            "no column 'score' .*; set dataset.reward_key, or null where every trace counts as a success",
        ),
        ({"actions_key": "messages"}, "messages is no list of actions"),
        ({"tools_file": "gone.json"}, "dataset.tools_file gone.json does not exist"),
    ],
)
def test_settings_of_a_trace_dataset_that_contradict_the_rows_are_refused(arguments, said, write):
    with pytest.raises(InputError, match=said):
        trace_dataset(write(episode(1, 1.0, *BOOK, *BYE)), **arguments)


def test_a_reward_that_is_text_counts_as_its_number(write):
    source = write(episode(1, "0", *BOOK, *BYE), episode(1, "1.0", *BOOK, *BYE))
    assert [example.id.endswith("row 1") for example in trace_dataset(source)] == [True]


@pytest.mark.parametrize("reward", ["solved", math.nan, "inf", [1.0]], ids=repr)
def test_a_reward_that_is_no_number_is_refused_and_is_no_failure(write, reward):
    with pytest.raises(
        InputError, match="row 1: reward is .*, not a number; .* or to null where every trace counts as a success"
    ):
        trace_dataset(write(episode(1, 1.0, *BOOK, *BYE), episode(2, reward, *BOOK, *BYE)))


@pytest.mark.parametrize(
    "rewards, settings, warned",
    [
        ([0.0, 40.0, 100.0], {}, True),
        ([0.0, 100.0], {}, False),
        ([0.0, 40.0, 100.0], {"success_threshold": 100.0}, False),
        ([0.0, 1.0, 1.2], {}, False),
    ],
)
def test_rewards_in_percent_are_named_where_nearly_all_of_them_pass_the_threshold(rewards, settings, warned, write, caplog):
    trace_dataset(write(*[episode(i, reward, *BOOK, *BYE) for i, reward in enumerate(rewards)]), **settings)
    said = "2 of 3 traces count as successes, with rewards from 40 to 100; .* set dataset.success_threshold (now 1)"
    assert bool(caplog.records) is warned and (
        not warned or re.search(said.replace("(", r"\(").replace(")", r"\)"), caplog.text)
    )


def test_damaged_files_are_refused(tmp_path):
    said = {
        "{": "line 1 is not valid JSON",
        "[]": "has no rows",
        '["x"]': "row 0 is a str, not an object",
        "3": "is not a list of objects",
    }
    for text, sentence in said.items():
        (tmp_path / "traces.json").write_text(text)
        with pytest.raises(InputError, match=f"traces.json.*{sentence}"):
            trace_dataset(str(tmp_path / "traces.json"))


# ------------------------------------------------------------------------------------------- the real traces


@needs_data
def test_real_traces_are_read_as_a_plain_reader_reads_them():
    rows = [json.loads(line) for line in REAL.read_text().splitlines()]
    best: dict[int, tuple[int, dict]] = {}
    for row in rows:
        steps = sum(message["role"] == "assistant" for message in row["messages"])
        if row["reward"] == 1 and (row["task_id"] not in best or steps < best[row["task_id"]][0]):
            best[row["task_id"]] = steps, row
    dataset = trace_dataset(str(REAL), "calls", actions_key="task.actions")
    assert len(dataset) == 30 and dataset.dropped == {"other_trace_of_task": 90}
    assert {int(e.data["task"]) for e in dataset if e.privileged} == best.keys() and len(best) == 18
    for example in dataset:
        assert [message["role"] for message in example.messages] == ["system", "user"]
        if example.privileged:
            _, row = best[int(example.data["task"])]
            raw = [c["function"] for m in row["messages"] for c in m.get("tool_calls") or []]
            lines = example.privileged.split("\n")[1:]
            assert len(lines) == max(1, len(raw))
            for line, function in zip(lines, raw, strict=False):
                name, _, rest = line.split(". ", 1)[1].partition("(")
                assert (name, json.loads(rest[:-1])) == (function["name"], json.loads(function["arguments"]))
            assert not any(m["content"] in example.privileged for m in row["messages"] if m["role"] == "tool" and m["content"])
    gold = trace_dataset(str(REAL), "gold_actions", actions_key="task.actions")
    assert all(example.privileged for example in gold)


# ------------------------------------------------------------------------------------------- templates without tools

NO_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TABLE = [
    {"role": "user", "content": "A table for two?"},
    call("book", seats=2),
    {"role": "tool", "content": "booked"},
    {"role": "assistant", "content": "Done."},
]


@pytest.mark.parametrize("derive_tools", [True, False])
def test_a_trace_with_calls_under_a_template_without_tools_is_refused_by_row_with_the_key_that_helps(
    write, tmp_path, derive_tools
):
    source = write({"task_id": "a", "reward": 1.0, "messages": TABLE})
    (example,) = trace_dataset(source, derive_tools=derive_tools)
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path / "model", NO_TOOLS)))
    what = "the tool 'book'" if derive_tools else "the name of the call 'book'"
    with pytest.raises(
        InputError, match=rf"traces\.jsonl row 0: .*the chat template leaves out {what}; set tokenizer\.tool_format"
    ):
        demonstration(example, PrivilegedPrompt().build(example, tokenizer).pair, tokenizer)
    as_text = HFChatTokenizer(str(tmp_path / "model"), tool_format="action")
    learned = demonstration(example, PrivilegedPrompt().build(example, as_text).pair, as_text)
    own = [i for i, mine in zip(learned.completion, learned.policy_mask, strict=True) if mine]
    assert as_text.decode(own) == '<action>{"name": "book", "arguments": {"seats": 2}}</action><|im_end|>Done.<|im_end|>'
