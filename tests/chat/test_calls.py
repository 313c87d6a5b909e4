"""Test how tool calls are read from messages, however they are written, and written as text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pidistill.chat.calls import CallStyle, ToolCall, as_call, calls_of, unreadable_calls
from pidistill.chat.messages import check_messages, tool_call_text
from pidistill.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.builds(ToolCall, st.text("abc_", min_size=1, max_size=6), st.dictionaries(st.text(max_size=5), JSON)))


def openai(call: ToolCall, as_text: bool) -> dict:
    arguments = json.dumps(call.arguments) if as_text else call.arguments
    return {"id": "call_1", "type": "function", "function": {"name": call.name, "arguments": arguments}}


@given(CALLS, st.booleans(), st.sampled_from(["arguments", "kwargs", "parameters", "args", "input"]))
def test_every_way_to_write_calls_says_the_same(calls, as_text, key):
    message = {"role": "assistant", "content": None, "tool_calls": [openai(call, as_text) for call in calls]}
    assert calls_of(message) == calls
    # A closing tag inside an argument ends the action, or the reasoning: JSON in text has no other way to know.
    inside = [json.dumps({"name": call.name, key: call.arguments}) for call in calls]
    tagged = "So I search.\n" + "\nand\n".join(f"<action>\n{text}\n</action>" for text in inside)
    if not any(tag in text for text in inside for tag in ("</action>", "</think>")):
        assert calls_of({"role": "assistant", "content": tagged}) == calls


def test_other_tags_are_text_until_they_are_named():
    said = {"role": "assistant", "content": '<call>{"name": "look", "arguments": {}}</call>'}
    assert calls_of(said) == [] and calls_of(said, ["call"]) == [ToolCall("look", {})]


UNREADABLE = ["look up the flight", "[1]", '{"arguments": {}}', '{"name": 3}', "{", "1" * 5000, "[" * 200_000]


@pytest.mark.parametrize("inside", UNREADABLE, ids=len)
def test_an_unreadable_action_is_counted_and_is_not_a_call(inside):
    said = {"role": "assistant", "content": f'<action>{inside}</action><action>{{"name": "look"}}</action>'}
    assert calls_of(said) == [ToolCall("look", {})] and unreadable_calls(said) == 1


def test_calls_within_reasoning_are_not_carried_out():
    look = '<action>{"name": "look"}</action>'
    for text, calls in (
        (f"<think>{look}</think>", 0),
        (f"<think>maybe {look}", 0),
        (f"{look}</think>{look}", 1),
        (f"<think>hm</think>{look}{look}", 2),
    ):
        assert len(calls_of({"role": "assistant", "content": text})) == calls


def test_arguments_that_are_no_object_stay_the_text_that_was_written():
    assert as_call({"name": "f", "arguments": "[1, 2]"}) == ToolCall("f", "[1, 2]")
    assert as_call({"function": {"name": "f", "arguments": "not json"}}) == ToolCall("f", "not json")


def asking(call: dict) -> dict:
    return {"role": "assistant", "tool_calls": [call]}


@pytest.mark.parametrize("key", ["arguments", "kwargs", "parameters", "args", "input"])
@pytest.mark.parametrize("bare", [False, True])
def test_arguments_of_a_call_in_a_message_are_read_under_each_name_that_a_recorded_call_may_use(key, bare):
    function = {"name": "f", key: '{"a": 1}'}
    (message,) = check_messages([asking(function if bare else {"type": "function", "function": function})], "row 0", "messages")
    assert calls_of(message) == [ToolCall("f", {"a": 1})] and tool_call_text(message["tool_calls"][0]) == 'f({"a": 1})'
    assert key == "arguments" or key not in json.dumps(message), "a template would write the arguments twice"


@pytest.mark.parametrize("given", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize("bare", [False, True])
def test_a_recorded_call_with_its_arguments_under_an_unknown_key_is_refused_and_is_never_one_without_arguments(given, bare):
    function = {"name": "f", "inputs": given, "arguments": None}
    call = function if bare else {"type": "function", "function": function}
    with pytest.raises(InputError, match=r"row 0: messages\[0\] has a call of f whose arguments seem to stand under 'inputs',"):
        check_messages([asking(call)], "row 0", "messages")
    assert as_call(call) is None
    text = {"role": "assistant", "content": f"<tool_call>{json.dumps(function)}</tool_call>"}
    assert calls_of(text) == [] and unreadable_calls(text) == 1


@pytest.mark.parametrize(
    "call",
    [
        {"name": "now", "id": "c1", "index": 0, "type": "tool_call"},
        {"function": {"name": "now"}, "extra_content": {"google": {"thought_signature": "x"}}},
        {"name": "now", "note": "at once", "more": {}, "nothing": {"a": None}},
    ],
)
def test_a_recorded_call_without_arguments_may_have_other_fields(call):
    (message,) = check_messages([asking(call)], "row 0", "messages")
    assert calls_of(message) == [ToolCall("now", {})] and as_call(call) == ToolCall("now", {})


BARE_XML = "Let me look.\n<function=bash>\n<parameter=command>grep '</function>' a\n</parameter>\n</function>"


def test_xml_calls_without_tags_around_them_are_calls_where_the_tag_of_xml_calls_is_read():
    said = {"role": "assistant", "content": BARE_XML + "\n<function=finish>\n</function>"}
    assert calls_of(said) == [ToolCall("bash", {"command": "grep '</function>' a"}), ToolCall("finish", {})]
    assert calls_of(said, ["action"]) == []
    tagged = {"role": "assistant", "content": f"<tool_call>{BARE_XML.partition(chr(10))[2]}</tool_call>"}
    assert calls_of(tagged) == calls_of(said)[:1]
    for text in ("Write <function=name> and close it.", "<function=a>\nwords\n</function>", "<function=a>" * 3000):
        said = {"role": "assistant", "content": text}
        assert calls_of(said) == [] and unreadable_calls(said) == 0


@given(CALLS)
def test_lines_are_in_the_calls_order_and_give_the_calls_back(calls):
    lines = CallStyle().write(calls).split("\n") if calls else []
    assert [line.split(". ", 1)[0] for line in lines] == [str(i) for i in range(1, len(calls) + 1)]
    for line, call in zip(lines, calls, strict=True):
        name, _, rest = line.split(". ", 1)[1].partition("(")
        assert ToolCall(name, json.loads(rest[:-1])) == call


def test_calls_are_written_with_the_template_and_without_the_tools_to_omit():
    turns = [
        {"role": "assistant", "tool_calls": [openai(ToolCall("think", {"thought": "hm"}), True)]},
        {"role": "tool", "content": '<action>{"name": "not_mine"}</action>'},
        {"role": "assistant", "tool_calls": [openai(ToolCall("book", {"to": "SEA"}), True)]},
    ]
    style = CallStyle("{number}) {name} with {arguments}", omit_tools=["think"])
    assert style.write(style.calls(turns)) == '1) book with {"to": "SEA"}'


@pytest.mark.parametrize("template", ["{name", "no placeholder", "{name} {result}"])
def test_a_template_that_would_write_nothing_is_refused(template):
    with pytest.raises(InputError, match="call_template"):
        CallStyle(template)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reasoning", [{"type": "text", "text": "two "}, {"type": "text", "text": "and two"}]),
        ("reasoning", {"text": "two and two"}),
        ("reasoning_details", [{"type": "reasoning.text", "text": "two and two"}]),
        ("thinking_blocks", [{"type": "thinking", "thinking": "two and two", "signature": "x"}]),
    ],
)
def test_reasoning_in_parts_is_one_text_and_reasoning_without_text_is_refused(key, value):
    question = {"role": "user", "content": "2+2?"}
    _, answer = check_messages([question, {"role": "assistant", "content": "4", key: value}], "row 0", "messages")
    assert answer == {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    with pytest.raises(InputError, match=f"has a '{key}' that is not text"):
        check_messages([question, {"role": "assistant", "content": "4", key: [{"data": "encrypted"}]}], "row 0", "messages")


def test_an_empty_list_of_calls_is_no_call():
    messages = [{"role": "user", "content": "hi", "tool_calls": []}, {"role": "assistant", "content": "ho", "tool_calls": []}]
    assert all("tool_calls" not in message for message in check_messages(messages, "row 0", "messages"))
