"""Test tool calls in assistant turns: what is read, what is refused with which words, and that reading inverts writing."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pidistill.chat.tool_calls import parse_turn_text, visible_text, written_format
from pidistill.envs import SingleTurn
from pidistill.errors import InputError
from pidistill.rewards import ExactMatch
from pidistill.rollouts import episode
from pidistill.tokenizers import HFChatTokenizer
from pidistill.types import Example
from tests.support.tiny_tokenizers import llama_folder, qwen_folder, r1_folder

PLAIN = (  # knows no tools
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops the reasoning of turns before the last user message and, asked not to think, opens every turn with an empty one.
THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set kept = loop.index0 > ns.last or m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content if kept else m.content.split('</think>\n\n')[-1]) + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if quiet is defined and quiet %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather now.", "parameters": SCHEMA}}]
HISTORY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How is it in Rome?"}]


def call(name="weather", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def turn(content="", *calls):
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls)} if calls else {})


def tool(content):
    return {"role": "tool", "content": content}


# ------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        ("hermes", "Hello.", turn("Hello.")),
        (
            "hermes",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
            turn("", call(city="Rome")),
        ),
        (
            "hermes",
            'Look:\n<tool_call>{"name": "a", "arguments": {}}</tool_call>\n<tool_call>{"arguments": {"x": [1, null]}, "name": '
            '"b"}</tool_call> end',
            turn("Look: end", call("a"), call("b", x=[1, None])),
        ),
        (
            "hermes",
            '<think>\nMaybe <tool_call>?\n</think>\n\n<tool_call>{"name": "a", "arguments": {}}</tool_call>',
            turn("<think>\nMaybe <tool_call>?\n</think>\n", call("a")),
        ),
        ("hermes", "<think>\nMaybe <tool_call>", turn("<think>\nMaybe <tool_call>")),
        ("llama3", '{"name": "weather", "parameters": {"city": "Rome"}}', turn("", call(city="Rome"))),
        ("llama3", '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}', turn("", call(city="Rome"))),
        ("llama3", '{"city": "Rome"}', turn('{"city": "Rome"}')),
        ("llama3", '{"name": "Alice", "age": 30}', turn('{"name": "Alice", "age": 30}')),
        ("llama3", '{"parameters": {}}', turn('{"parameters": {}}')),
        ("llama3", 'I say {"name": "weather", "parameters": {}}', turn('I say {"name": "weather", "parameters": {}}')),
        ("action", 'So <action>{"name": "a", "arguments": {"n": 1.5}}</action>', turn("So ", call("a", n=1.5))),
        ("none", "<tool_call>{</tool_call>", turn("<tool_call>{</tool_call>")),
    ],
)
def test_a_turn_of_each_format_is_read_as_its_message(format, text, expected):
    assert parse_turn_text(text, format) == expected


@pytest.mark.parametrize(
    ("format", "text", "said"),
    [
        ("hermes", '<tool_call>{"name": "a", "arguments": {}</tool_call>', "not valid JSON"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>', "NaN is not JSON"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "no name"),
        ("hermes", '<tool_call>["a"]</tool_call>', "no name"),
        (
            "hermes",
            '<tool_call>{"name": "a", "arguments": "x"}</tool_call>',
            "arguments of the call of a must be a JSON object",
        ),
        ("hermes", '<tool_call>{"name": "a", "arguments": {}}', "is not closed by </tool_call>"),
        ("hermes", "so </tool_call>", "</tool_call> without <tool_call>"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"x": "\\ud800"}}</tool_call>', "not valid JSON"),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON"),
        ("llama3", '{"name": "a", "parameters": {}', "not valid JSON"),
        ("llama3", '{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}', "not valid JSON"),
        ("llama3", '<|python_tag|>{"parameters": {}}', 'like {"name": "...", "parameters": {...}}'),
        ("llama3", "<|python_tag|>print(1)", "not valid JSON"),
        ("action", "<action>a(1)</action>", "not valid JSON"),
    ],
)
def test_a_malformed_call_is_text_with_the_reason(format, text, said):
    message = parse_turn_text(text, format)
    assert said in message["tool_call_error"] and "tool_calls" not in message and message["content"] == text


def test_one_malformed_call_spoils_the_turn():
    """Half of what a turn asked for is not what it asked for."""
    good, bad = '<tool_call>{"name": "a", "arguments": {}}</tool_call>', "<tool_call>{</tool_call>"
    assert "tool_calls" not in parse_turn_text(good + bad, "hermes")


def test_the_visible_text_leaves_reasoning_out():
    assert visible_text(turn("<think>\nlong\n</think>\n\nHello. ")) == "Hello."
    assert visible_text(turn("opened by the prompt\n</think>\nHello.")) == "Hello."
    assert visible_text(turn("<think>never closed")) == "" and visible_text(turn("Hello.")) == "Hello."


@given(st.text(alphabet=' {}[]":,abn1\n<>/|', max_size=40), st.sampled_from(["hermes", "llama3", "action"]))
def test_reading_any_text_as_a_turn_never_raises(inside, format):
    for text in (inside, f"<tool_call>{inside}</tool_call>", f"<action>{inside}</action>", f"<|python_tag|>{inside}"):
        message = parse_turn_text(text, format)
        assert message["role"] == "assistant" and isinstance(message["content"], str)
        assert not ("tool_calls" in message and "tool_call_error" in message)


# ------------------------------------------------------------------------------------------- reading inverts writing


def tokenizers(tmp_path):
    return {
        "hermes": HFChatTokenizer(str(qwen_folder(tmp_path / "qwen"))),
        "llama3": HFChatTokenizer(str(llama_folder(tmp_path / "llama"))),
        "action": HFChatTokenizer(str(qwen_folder(tmp_path / "plain", PLAIN)), tool_format="action"),
    }


@pytest.mark.parametrize("format", ["hermes", "llama3", "action"])
def test_reading_a_written_turn_and_writing_it_again_gives_its_ids(tmp_path, format):
    tokenizer = tokenizers(tmp_path)[format]
    assert tokenizer.tool_format == format
    turns = [turn("Sunny."), turn("", call(city="Rome")), turn("", call(city='"Ün{i}" \n', days=[1, 2.5, None, True]))]
    if format != "llama3":
        turns += [turn("Let me look.", call(city="Rome")), turn("Both.\n\nNow:", call(city="a"), call("other"))]
    for given_turn in turns:
        ids = tokenizer.encode_turn(HISTORY, given_turn, TOOLS)
        assert tokenizer.parse_turn(ids, TOOLS) == given_turn
        assert tokenizer.encode_turn(HISTORY, tokenizer.parse_turn(ids, TOOLS), TOOLS) == ids
        assert tokenizer.parse_turn(ids[:-1], TOOLS) == given_turn


@pytest.mark.parametrize(
    ("format", "answer"),
    [
        ("llama3", '{"name": "Alice", "age": 30}'),
        ("llama3", '{"name": "weather", "parameters": {"city": "Rome"}}'),
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'),
    ],
)
def test_without_tools_an_answer_that_looks_like_a_call_is_an_answer(tmp_path, format, answer):
    tokenizer = tokenizers(tmp_path)[format]
    ids = tokenizer.encode_turn(HISTORY, turn(answer))
    for tools in (None, []):
        said = tokenizer.parse_turn(ids, tools)
        assert said == turn(answer)
    environment = SingleTurn(reward=ExactMatch())
    row = Example(id="row 0", messages=HISTORY, reference=answer)
    assert environment.step(environment.reset(row), said, truncated=False).reward == 1.0


def test_the_action_tags_are_read_without_tools(tmp_path):
    """Their name in the config says that the messages tell what can be called."""
    tokenizer = tokenizers(tmp_path)["action"]
    ids = tokenizer.encode_turn(HISTORY, turn("", call(city="Rome")))
    assert tokenizer.parse_turn(ids) == turn("", call(city="Rome"))


def test_observations_follow_a_turn_whatever_was_wrong_with_it(tmp_path):
    tokenizer = tokenizers(tmp_path)["hermes"]
    wrong = parse_turn_text("<tool_call>{</tool_call>", "hermes")
    right = parse_turn_text('<tool_call>{"name": "weather", "arguments": {}}</tool_call>', "hermes")
    after = [tokenizer.encode_observations([*HISTORY, said], [tool("no")], TOOLS) for said in (wrong, right)]
    assert after[0] == after[1] and "<tool_response>\nno\n</tool_response>" in tokenizer.decode(after[0])


# ------------------------------------------------------------------------------------------- the format of a template


def test_auto_is_what_the_template_writes(tmp_path):
    assert HFChatTokenizer(str(qwen_folder(tmp_path / "a", PLAIN))).tool_format == "none"  # it leaves calls out
    reversed_keys = '<tool_call>\n{"arguments": {"probe_key": "probe_value"}, "name": "probe_name"}\n</tool_call>'
    assert written_format(reversed_keys) == "hermes"
    assert written_format("[TOOL_CALLS] probe_name(probe_value)") is None


def test_an_unknown_form_is_said_and_stays_text(tmp_path, caplog):
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}[CALL]{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    with caplog.at_level(logging.WARNING):
        tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, template)), stop_tokens=["<|im_end|>"])
    assert tokenizer.tool_format == "none" and "a form unknown here" in caplog.text


def test_a_format_that_the_template_does_not_write_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"tool_format is llama3, but the chat template writes .* \(hermes\)"):
        HFChatTokenizer(str(qwen_folder(tmp_path)), tool_format="llama3")
    with pytest.raises(InputError, match="known are auto, hermes, llama3, action, none"):
        HFChatTokenizer(str(qwen_folder(tmp_path)), tool_format="json")


def test_the_action_format_writes_tools_as_text(tmp_path):
    tokenizer = tokenizers(tmp_path)["action"]
    prompt = tokenizer.decode(tokenizer.encode_prompt(HISTORY, TOOLS))
    assert "Be brief." in prompt and json.dumps(TOOLS[0]["function"]) in prompt and "<action>" in prompt
    assert "weather" in tokenizer.decode(tokenizer.encode_prompt(HISTORY[1:], TOOLS))
    result = tokenizer.encode_observations([*HISTORY, turn("", call(city="Rome"))], [tool("22 degrees")], TOOLS)
    assert "<|im_start|>user\n<result>\n22 degrees\n</result><|im_end|>" in tokenizer.decode(result)


def test_the_results_of_one_turn_share_a_message_in_the_action_format(tmp_path):
    """Templates without tools often refuse two user messages in a row."""
    template = (
        "{% for m in messages %}{% if loop.previtem and loop.previtem.role == m.role %}{{ raise_exception('alternate') }}"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, template)), tool_format="action")
    history = [*HISTORY, turn("", call(city="Rome"), call(city="Bern"))]
    said = tokenizer.decode(tokenizer.encode_observations(history, [tool("22 degrees"), tool("9 degrees")], TOOLS))
    assert said.count("<|im_start|>user") == 1 and "22 degrees\n</result>\n<result>\n9 degrees" in said


def test_the_action_format_keeps_a_default_system_text(tmp_path):
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path)), tool_format="action")
    prompt = tokenizer.decode(tokenizer.encode_prompt(HISTORY[1:], TOOLS))
    default = tokenizer.default_system(TOOLS)
    assert default == "You are tiny, a helpful assistant." and default in prompt
    written_out = [{"role": "system", "content": default}, *HISTORY[1:]]
    assert tokenizer.encode_prompt(written_out, TOOLS) == tokenizer.encode_prompt(HISTORY[1:], TOOLS)


# ------------------------------------------------------------------------------------------- templates that rewrite history


def test_rewritten_history_is_found(tmp_path):
    assert HFChatTokenizer(str(qwen_folder(tmp_path / "a"))).history_rewrites() is None
    assert HFChatTokenizer(str(llama_folder(tmp_path / "b"))).history_rewrites() is None
    said = HFChatTokenizer(str(qwen_folder(tmp_path / "c", THINKING))).history_rewrites()
    assert "turns with reasoning that a user message follows" in said and "with reasoning that a tool" not in said
    said = HFChatTokenizer(str(r1_folder(tmp_path / "d"))).history_rewrites()
    assert "turns with reasoning that a user message follows" in said
    off = HFChatTokenizer(str(qwen_folder(tmp_path / "e", THINKING)), template_kwargs={"quiet": True})
    assert "turns without reasoning that a user message follows" in off.history_rewrites()


def test_the_collector_says_it_once(tmp_path, caplog):
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, THINKING)))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            episode._warn_of_rewritten_turns(tokenizer)
    assert caplog.text.count("the chat template rewrites") == 1
