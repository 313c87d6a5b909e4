"""Test tool calls in assistant turns: what is read, what is refused with which words, and that reading inverts writing."""

import json
import logging
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pidistill.chat.messages import message_text
from pidistill.chat.phrases import assistant_text
from pidistill.chat.tool_calls import FORMATS, parse_turn_text, visible_text, written_format
from pidistill.envs import SingleTurn
from pidistill.errors import InputError
from pidistill.rewards import ExactMatch
from pidistill.rollouts import episode
from pidistill.tokenizers import HFChatTokenizer
from pidistill.tokenizers.chat_template import ChatTemplate
from pidistill.types import Example
from tests.support.chat_templates import QWEN3
from tests.support.newer_templates import HARMONY, OLMO3, QWEN3_CODER, QWEN35, newer_folder
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
# As Mistral Nemo's: the system text and the tools stand with the last question; calls have ids of nine characters.
NEMO = (
    "{% set given = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == asked[-1] %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "[INST]{{ given if loop.last }}{{ m.content }}[/INST]"
    "{% elif m.tool_calls is defined %}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('Tool call IDs have length 9!') }}{% endif %}"
    "[TOOL_CALLS][{{ c.function | tojson }}]<|im_end|>{% endfor %}"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% elif m.role == 'tool' %}[RESULT]{{ m.content }}{% endif %}"
    "{% endfor %}"
)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "array"},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "is_open": {"type": "boolean"},
        "where": {"anyOf": [{"type": "object"}, {"type": "null"}]},
        "any": {"type": ["string", "integer"]},
        "size": {"enum": ["s", "m", 3]},
    },
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather now.", "parameters": SCHEMA}}]
HISTORY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How is it in Rome?"}]


def call(name="weather", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def turn(content="", *calls):
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls)} if calls else {})


def tool(content):
    return {"role": "tool", "content": content}


def xml_call(key, value):
    return f"<tool_call>\n<function=weather>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"


ANALYSIS, NEXT = "<|channel|>analysis<|message|>hm", "<|end|><|start|>assistant"

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
        ("xml", xml_call("city", "5"), turn("", call(city="5"))),
        ("xml", xml_call("count", "5"), turn("", call(count=5))),
        ("xml", xml_call("share", "5"), turn("", call(share=5))),
        ("xml", xml_call("is_open", "True"), turn("", call(is_open=True))),
        ("xml", xml_call("is_open", "true"), turn("", call(is_open=True))),
        ("xml", xml_call("where", "None"), turn("", call(where=None))),
        ("xml", xml_call("where", '{"a": [1]}'), turn("", call(where={"a": [1]}))),
        ("xml", xml_call("any", "5"), turn("", call(any=5))),
        ("xml", xml_call("any", "5.5"), turn("", call(any="5.5"))),
        ("xml", xml_call("size", "m"), turn("", call(size="m"))),
        ("xml", xml_call("size", "3"), turn("", call(size=3))),
        ("xml", xml_call("unknown", "5"), turn("", call(unknown="5"))),
        ("xml", xml_call("count", "many"), turn("", call(count="many"))),  # the tool says what it wants
        ("xml", xml_call("share", "1e999"), turn("", call(share="1e999"))),
        ("xml", xml_call("city", "\n two\nlines \n"), turn("", call(city="\n two\nlines \n"))),
        ("xml", "<tool_call><function=a><parameter=b>c</parameter></function></tool_call>", turn("", call("a", b="c"))),
        ("xml", "<tool_call>\n<function=a>\n</function>\n</tool_call>", turn("", call("a"))),
        ("xml", "Look:\n\n" + xml_call("city", "Rome"), turn("Look:", call(city="Rome"))),
        ("xml", "hm\n</think>\n\n" + xml_call("city", "Rome"), turn("hm\n</think>", call(city="Rome"))),
        ("xml", "<think>\n" + xml_call("city", "Rome"), turn("<think>\n" + xml_call("city", "Rome"))),
        ("harmony", "<|channel|>final<|message|>Hello.", turn("Hello.")),
        ("harmony", "Hello.", turn("Hello.")),
        ("harmony", ANALYSIS + NEXT + "<|channel|>final<|message|>Hello.", turn("Hello.") | {"reasoning_content": "hm"}),
        ("harmony", ANALYSIS, turn("") | {"reasoning_content": "hm"}),  # the limit cut it
        ("harmony", " to=functions.weather<|channel|>commentary json<|message|>{}", turn("", call())),
        (
            "harmony",
            ANALYSIS + NEXT + '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}',
            turn("", call(city="Rome")) | {"reasoning_content": "hm"},
        ),
        (
            "harmony",
            f"{ANALYSIS}{NEXT}<|channel|>commentary<|message|>I look.{NEXT} to=weather<|channel|>commentary<|message|>{{}}",
            turn("", call()) | {"reasoning_content": "hm\n\nI look."},
        ),
    ],
)
def test_a_turn_of_each_format_is_read_as_its_message(format, text, expected):
    assert parse_turn_text(text, format, TOOLS) == expected


@pytest.mark.parametrize(
    ("format", "text", "said"),
    [
        ("hermes", '<tool_call>{"name": "a", "arguments": {}</tool_call>', "not valid JSON"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>', "NaN is not JSON"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"x": 1e999}}</tool_call>', "1e999 is too large a number"),
        ("llama3", '{"name": "a", "parameters": {"x": [-1e999]}}', "-1e999 is too large a number"),
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
        ("xml", '<tool_call>{"name": "a"}</tool_call>', "is not <function=...> ... </function>"),
        ("xml", "<tool_call><function=a></tool_call>", "is not <function=...> ... </function>"),
        (
            "xml",
            "<tool_call><function=a><parameter=b>c</function></tool_call>",
            "the call of a is not a row of <parameter=...>",
        ),
        ("xml", "<tool_call><function=a>b</function></tool_call>", "the call of a is not a row of <parameter=...>"),
        ("xml", xml_call("b", "x</parameter>y"), "is not a row of <parameter=...> ... </parameter>: y"),
        ("xml", "<tool_call><function=a>" + "<parameter=b>c</parameter>" * 2 + "</function></tool_call>", "b twice"),
        ("xml", "<tool_call><function=a></function>", "is not closed by </tool_call>"),
        ("harmony", " to=functions.a<|channel|>commentary json<|message|>{", "not valid JSON"),
        ("harmony", " to=functions.a<|channel|>commentary json<|message|>[1]", "arguments of the call of functions.a must be"),
        ("harmony", " to=functions.<|channel|>commentary json<|message|>{}", "must be a JSON object"),
        ("harmony", f"<|channel|>commentary to=a<|message|>{{}}{NEXT}<|channel|>final<|message|>b", "ends with its call"),
        ("harmony", "<|channel|>thoughts<|message|>hm", "thoughts is none of analysis, commentary and final"),
        ("harmony", "<|channel|>final", "is not <|channel|>...<|message|>"),
        ("harmony", "<|channel|>final<|message|>a<|channel|>final<|message|>b", "holds a control token"),
    ],
)
def test_a_malformed_call_is_text_with_the_reason(format, text, said):
    message = parse_turn_text(text, format)
    assert said in message["tool_call_error"] and "tool_calls" not in message and message["content"] == text


@pytest.mark.parametrize("format", ["hermes", "action"])
def test_arguments_under_another_name_are_the_arguments_and_none_at_all_is_said(format):
    tag = {"hermes": "tool_call", "action": "action"}[format]
    text = f'<{tag}>{{"name": "weather", "parameters": {{"city": "Rome"}}}}</{tag}>'
    assert parse_turn_text(text, format)["tool_calls"] == [call(city="Rome")]
    said = parse_turn_text(text.replace("parameters", "input"), format)
    assert "has input in place of arguments" in said["tool_call_error"] and "tool_calls" not in said


@pytest.mark.parametrize("word", ["<think>", "</think>", "<think></think>"])
@pytest.mark.parametrize("before", ["", "I look. ", "<think>hm</think>\n", "opened by the prompt</think>\n"])
def test_a_tag_of_reasoning_inside_an_argument_is_text(word, before):
    for format, text in (
        ("hermes", f'<tool_call>{{"name": "weather", "arguments": {{"city": "{word}"}}}}</tool_call>'),
        ("xml", xml_call("city", word)),
    ):
        message = parse_turn_text(before + text, format, TOOLS)
        assert message["tool_calls"] == [call(city=word)] and "tool_call_error" not in message
        assert message["content"].strip() == before.strip()


def test_one_malformed_call_spoils_the_turn():
    """Half of what a turn asked for is not what it asked for."""
    good, bad = '<tool_call>{"name": "a", "arguments": {}}</tool_call>', "<tool_call>{</tool_call>"
    assert "tool_calls" not in parse_turn_text(good + bad, "hermes")


def test_the_visible_text_leaves_reasoning_out():
    assert visible_text(turn("<think>\nlong\n</think>\n\nHello. ")) == "Hello."
    assert visible_text(turn("opened by the prompt\n</think>\nHello.")) == "Hello."
    assert visible_text(turn("<think>never closed")) == "" and visible_text(turn("Hello.")) == "Hello."
    for spoken in ("Use <think> to begin; answer 7", "`<think>` and `</think>`: 7 then"):
        assert visible_text(turn(spoken)) == spoken, "an answer may speak of the tags"
    assert visible_text(turn("7 <think>") | {"reasoning_content": "r"}) == "7 <think>"


AROUND = ("{}", "<tool_call>{}</tool_call>", "<action>{}</action>", "<|python_tag|>{}")
AROUND += ("<tool_call><function={}</function></tool_call>", xml_call("count", "{}"), ANALYSIS + NEXT + "{}<|message|>{{}}{}")


@given(st.text(alphabet=' {}[]":,abn1\n<>/|=', max_size=40), st.sampled_from(FORMATS))
def test_reading_any_text_as_a_turn_never_raises(inside, format):
    for around in AROUND:
        text = around.replace("{}", inside)
        message = parse_turn_text(text, format, TOOLS)
        assert message["role"] == "assistant" and isinstance(message["content"], str)
        assert not ("tool_calls" in message and "tool_call_error" in message)


# ------------------------------------------------------------------------------------------- reading inverts writing


def tokenizers(tmp_path):
    return {
        "hermes": HFChatTokenizer(str(qwen_folder(tmp_path / "qwen"))),
        "llama3": HFChatTokenizer(str(llama_folder(tmp_path / "llama"))),
        "action": HFChatTokenizer(str(qwen_folder(tmp_path / "plain", PLAIN)), tool_format="action"),
        "xml": HFChatTokenizer(str(newer_folder(tmp_path / "coder", QWEN3_CODER))),
        "xml, reasoning": HFChatTokenizer(
            str(newer_folder(tmp_path / "q35", QWEN35)), template_kwargs={"enable_thinking": False}
        ),
        "harmony": HFChatTokenizer(str(newer_folder(tmp_path / "harmony", HARMONY))),
    }


@pytest.mark.parametrize("format", ["hermes", "llama3", "action", "xml", "xml, reasoning", "harmony"])
def test_reading_a_written_turn_and_writing_it_again_gives_its_ids(tmp_path, format):
    tokenizer = tokenizers(tmp_path)[format]
    assert tokenizer.tool_format == format.partition(",")[0]
    turns = [turn("Sunny."), turn("", call(city="Rome")), turn("", call(city='"Ün{i}" \n', days=[1, 2.5, None, True]))]
    if format == "harmony":
        reasoning = {"reasoning_content": "It may rain."}
        turns += [turn("Sunny.") | reasoning, turn("", call(city="Rome")) | reasoning]
    elif format != "llama3":
        turns += [turn("Let me look.", call(city="Rome")), turn("Both.\n\nNow:", call(city="a"), call("other"))]
    for given_turn in turns:
        ids = tokenizer.encode_turn(HISTORY, given_turn, TOOLS)
        assert tokenizer.parse_turn(ids, TOOLS) == given_turn
        assert tokenizer.encode_turn(HISTORY, tokenizer.parse_turn(ids, TOOLS), TOOLS) == ids
        assert tokenizer.parse_turn(ids[:-1], TOOLS) == given_turn


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": st.text(),
        "days": st.lists(JSON, max_size=3),
        "count": st.integers(),
        "share": st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
        "is_open": st.booleans(),
        "where": st.none() | st.dictionaries(st.text(), JSON, max_size=3),
        "size": st.sampled_from(["s", "m", 3]),
        "note": st.text(),
    },
)
TEMPLATES = {"hermes": QWEN3, "xml": QWEN35, "xml, Python's values": QWEN3_CODER, "harmony": HARMONY}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(arguments=st.lists(ARGUMENTS, min_size=1, max_size=2), content=st.sampled_from(["", "Let me look."]))
def test_calls_are_read_as_they_were_written(name, arguments, content):
    """Every value that the format can hold comes back with its type; a tag of the format's own inside a text cannot."""
    format = name.partition(",")[0]
    arguments = arguments[:1] if format == "harmony" else arguments
    said = "".join(text for values in arguments for text in map(str, values.values()))
    assume(not re.search(r"</?(tool_call|parameter|function|think)|<\|", said))
    template = ChatTemplate({"default": TEMPLATES[name]}, {"enable_thinking": False})
    given_turn = turn(content, *(call(**values) for values in arguments))
    history = HISTORY[1:]
    prompt, whole = template.render(history, TOOLS, True), template.render([*history, given_turn], TOOLS, False)
    text = whole[len(prompt.removesuffix("<think>\n\n</think>\n\n")) :].removeprefix("<think>\n\n</think>\n\n")
    found = parse_turn_text(re.split(r"<\|(?:im_end|call)\|>", text)[0], format, TOOLS)
    assert found["tool_calls"] == given_turn["tool_calls"]
    assert [list(map(type, c["function"]["arguments"].values())) for c in found["tool_calls"]] == [
        list(map(type, values.values())) for values in arguments
    ]
    assert found["content"] == ("" if format == "harmony" else content)
    assert found.get("reasoning_content", "") == (content if format == "harmony" else "")


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


def test_an_answer_to_a_malformed_call_is_the_users_where_results_need_a_call(tmp_path):
    """gpt-oss's template names the caller of a result, and refuses one without: the model must not end the run with it."""
    tokenizer = tokenizers(tmp_path)["harmony"]
    said = tokenizer.parse_turn(tokenizer._ids(" to=functions.weather<|channel|>commentary json<|message|>{<|call|>"), TOOLS)
    assert "not valid JSON" in said["tool_call_error"]
    added = tokenizer.decode(tokenizer.encode_observations([*HISTORY, said], [tool("Error: no")], TOOLS))
    assert added == "<|start|>user<|message|>Error: no<|end|><|start|>assistant"
    later = [*HISTORY, said, tool("Error: no"), turn("", call(city="Rome"))]
    added = tokenizer.decode(tokenizer.encode_observations(later, [tool("Sunny")], TOOLS))
    assert added.startswith('<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"Sunny"<|end|>')
    with pytest.raises(InputError, match="A result without a call before it"):  # a row of the dataset that is wrong
        tokenizer.encode_prompt([*HISTORY, turn("Hello."), tool("Sunny")], TOOLS)


def test_reasoning_in_a_channel_is_not_the_answer_and_counts_as_said(tmp_path):
    tokenizer = tokenizers(tmp_path)["harmony"]
    said = tokenizer.parse_turn(tokenizer._ids(f"{ANALYSIS} Zebra-4711{NEXT}<|channel|>final<|message|>72<|return|>"))
    assert message_text(said) == visible_text(said) == "72"
    assert "Zebra-4711" in assistant_text([said])


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
    assert HFChatTokenizer(str(newer_folder(tmp_path / "b", QWEN35))).tool_format == "xml"
    assert HFChatTokenizer(str(newer_folder(tmp_path / "c", HARMONY))).tool_format == "harmony"


def test_an_unknown_form_is_said_and_stays_text(tmp_path, caplog):
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}[CALL]{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    with caplog.at_level(logging.WARNING):
        tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, template)), stop_tokens=["<|im_end|>"])
        tokenizer.encode_prompt(HISTORY)
        assert tokenizer.tool_format == "none" and not caplog.text, "without tools nothing is a call"
        tokenizer.encode_prompt(HISTORY, TOOLS)
        tokenizer.encode_prompt(HISTORY, TOOLS)
    assert caplog.text.count("a form unknown here") == 1 and "set tokenizer.tool_format: action" in caplog.text


def test_a_template_that_wants_ids_of_nine_characters_has_a_form_that_is_unknown(tmp_path, caplog):
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, NEMO)))
    tokenizer.encode_prompt(HISTORY, TOOLS)
    assert tokenizer.tool_format == "none" and caplog.text.count("a form unknown here") == 1


def test_a_template_that_shows_tools_and_leaves_calls_out_is_said(tmp_path, caplog):
    HFChatTokenizer(str(qwen_folder(tmp_path / "a", "{{ tools or '' }}" + PLAIN))).encode_prompt(HISTORY, TOOLS)
    assert caplog.text.count("shows tools and leaves the calls out") == 1
    caplog.clear()
    for name, chosen in (("b", {"tool_format": "none"}), ("c", {"tool_format": "action"})):
        HFChatTokenizer(str(qwen_folder(tmp_path / name, PLAIN)), **chosen).encode_prompt(HISTORY, TOOLS)
    assert not caplog.text


def test_a_format_that_the_template_does_not_write_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"tool_format is llama3, but the chat template writes .* \(hermes\)"):
        HFChatTokenizer(str(qwen_folder(tmp_path)), tool_format="llama3")
    with pytest.raises(InputError, match="choose one of auto, hermes, llama3, xml, harmony, action, none"):
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
    said = HFChatTokenizer(str(newer_folder(tmp_path / "f", OLMO3))).history_rewrites()
    assert said.startswith(
        "the chat template rewrites the ends of turns that a user message follows, and the ends of turns that"
    )
    assert HFChatTokenizer(str(llama_folder(tmp_path / "b"))).history_rewrites() is None
    said = HFChatTokenizer(str(qwen_folder(tmp_path / "c", THINKING))).history_rewrites()
    assert "turns with reasoning that a user message follows" in said and "with reasoning that a tool" not in said
    said = HFChatTokenizer(str(r1_folder(tmp_path / "d"))).history_rewrites()
    assert "turns with reasoning that a user message follows" in said
    off = HFChatTokenizer(str(qwen_folder(tmp_path / "e", THINKING)), template_kwargs={"quiet": True})
    assert "turns without reasoning that a user message follows" in off.history_rewrites()
    said = HFChatTokenizer(str(qwen_folder(tmp_path / "g", NEMO))).history_rewrites()
    assert said.startswith("the chat template rewrites what stands before turns that a user message follows, and what stands")


def test_the_collector_says_it_once(tmp_path, caplog):
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, THINKING)))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            episode._warn_of_rewritten_turns(tokenizer)
    assert caplog.text.count("the chat template rewrites") == 1
