"""Test rows stored another way: they are read where there is one meaning, and refused by name where there is none."""

import json

import datasets
import pytest

from pidistill.chat.messages import check_messages, message_text
from pidistill.data import build_demonstrations, build_prompts, chat_dataset, demonstration, qa_dataset, trace_dataset
from pidistill.errors import InputError
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.tokenizers import HFChatTokenizer
from pidistill.types import PromptPair
from tests.support.tiny_tokenizers import qwen_folder

USER = {"role": "user", "content": "A table for two?"}
ANSWER = {"role": "assistant", "content": "Done."}
BOOK = {"name": "book", "arguments": {"seats": 2, "note": None}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return HFChatTokenizer(str(qwen_folder(tmp_path_factory.mktemp("qwen"))))


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path, *rows, **options):
    return list(chat_dataset(lines(path, *rows), **{"privileged_key": None, "completion": "after_last_user"} | options))


def tool(name, key, kind):
    parameters = {"type": "object", "properties": {key: {"type": kind, "default": None}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_messages_as_json_text_are_messages(tmp_path, name):
    text = json.dumps([USER, ANSWER])
    if name.endswith(".csv"):
        (tmp_path / name).write_text('messages\n"' + text.replace('"', '""') + '"\n')
        (row,) = chat_dataset(str(tmp_path / name), privileged_key=None, completion="after_last_user")
    else:
        (row,) = read(tmp_path / name, {"messages": text})
    assert row.messages == [USER] and row.completion == [ANSWER]


def test_a_text_that_only_looks_like_a_list_is_one_user_message(tmp_path):
    flights = '[{"from": "Rome", "to": "Paris"}]'
    for text in ("[1, 2]", "[brackets", '[{"city": "Rome"}]', flights, '[{"role": "waiter"}]', "[" * 200_000):
        (row,) = read(tmp_path / "rows.jsonl", {"messages": text}, completion=None)
        assert row.messages == [{"role": "user", "content": text}]


def test_sharegpt_rows_are_read(tmp_path):
    turns = [{"from": "human", "value": "A table?"}, {"from": "function_call", "value": json.dumps(BOOK)},
             {"from": "observation", "value": "booked"}, {"from": "gpt", "value": "Done."}]  # fmt: skip
    (row,) = read(tmp_path / "rows.jsonl", {"conversations": turns, "system": "Be brief."}, messages_key="conversations")
    assert row.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A table?"}]
    called, result, said = row.completion
    assert called["tool_calls"] == [{"type": "function", "function": BOOK}]
    assert result == {"role": "tool", "content": "booked"} and said == ANSWER
    with pytest.raises(InputError, match=r"rows.jsonl row 0: messages\[0\] is from 'alien', which is unknown; write one"):
        read(tmp_path / "rows.jsonl", {"messages": [{"from": "alien", "value": "x"}]})


def test_a_question_or_information_that_only_looks_like_messages_is_a_text(tmp_path):
    flights = '[{"from": "Rome", "to": "Paris"}]'
    (row,) = qa_dataset(lines(tmp_path / "qa.jsonl", {"question": flights, "answer": "1", "pi": flights}), privileged_key="pi")
    assert row.messages == [{"role": "user", "content": flights}] and row.privileged == flights
    with pytest.raises(InputError, match=r"messages\[1\] has no 'content'"):
        read(tmp_path / "rows.jsonl", {"messages": json.dumps([USER, {"role": "assistant"}])})


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": ["user"], "content": "a"}, r"has the unknown role \['user'\]; known roles are system, user"),
        ({"role": {"a": 1}, "content": "a"}, r"has the unknown role \{'a': 1\}; known roles"),
        ({"from": ["human"], "value": "a"}, r"is from \['human'\], which is unknown; write one of human"),
    ],
)
def test_a_role_that_is_no_text_is_refused(message, said):
    with pytest.raises(InputError, match=rf"row 0: messages\[0\] {said}"):
        check_messages([message], "row 0", "messages")


def test_text_parts_may_have_what_is_said_about_the_text_and_nulls_of_a_table():
    parts = [
        {"text": "a"},
        {"type": "input_text", "text": "b", "image_url": None, "input_audio": {"data": None}},
        {"type": "output_text", "text": "c", "annotations": [{"type": "file_citation", "file_id": "f"}], "logprobs": [0.5]},
        {"type": "text", "text": "d", "cache_control": {"type": "ephemeral"}, "citations": [{"cited_text": "e"}], "index": 1},
    ]
    (message,) = check_messages([{"role": "user", "content": parts}], "row 0", "messages")
    assert message_text(message) == "abcd"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "reasoning", "text": "Secret thought."},
        {"type": "image_url", "image_url": {"url": "cat.png"}, "text": ""},
        {"type": "text", "text": "", "image_url": {"url": "cat.png"}},
        {"text": "What animal is this?", "image": b"png"},
        {"text": "Secret thought.", "thought": True},
    ],
)
def test_a_content_part_that_holds_more_or_other_than_text_is_refused(part):
    with pytest.raises(InputError, match=r"row 0: messages\[0\] has a content part that is not text .* leave the row out"):
        check_messages([{"role": "assistant", "content": [part, {"type": "text", "text": "Answer."}]}], "row 0", "messages")


# ------------------------------------------------------------------------------------------- results of parallel calls


def asks(*ids):
    return {"role": "assistant", "content": "", "tool_calls": [{"id": i, "function": BOOK} for i in ids]}


def results(*ids):
    """Return one result per id, with its place in the given order as content."""
    return [{"role": "tool", "content": str(at), "tool_call_id": i} for at, i in enumerate(ids)]


def order_of(*messages):
    return "".join(m["content"] for m in check_messages([USER, *messages], "row 0", "messages") if m["role"] == "tool")


def test_results_of_parallel_calls_stand_in_the_order_of_the_calls():
    assert order_of(asks("a", "b", "c"), *results("c", "a", "b")) == "120"
    assert order_of(asks("a", "b", "c"), *results("c", "a")) == "10"
    assert order_of(asks(1, 0), *results("0", "1")) == "10"
    assert order_of(asks("a"), asks("b"), *results("b", "a")) == "10"
    assert order_of(asks("a", "b"), *results("b", "a"), ANSWER, asks("b", "a"), *results("b", "a")) == "1001"


@pytest.mark.parametrize(
    ("calls", "ids"),
    [
        ("aa", "aa"),
        ("aab", "baa"),
        ("ab", [None, None]),
        ("ab", ["", ""]),
        ("ab", ["b", None]),
        (["", ""], "ba"),
        ([None, "b"], "b"),
    ],
)
def test_results_stay_in_their_order_where_ids_do_not_say_one(calls, ids):
    assert order_of(asks(*calls), *results(*ids)) == "012"[: len(ids)]


def test_results_that_follow_no_call_stay_as_they_are():
    said = {"role": "assistant", "content": '<action>{"name": "book"}</action>'}
    assert order_of(said, *results("b", "a")) == "01" and order_of(asks("a"), USER, *results("x")) == "0"


def test_results_of_the_same_call_stay_in_their_order_and_those_of_unknown_calls_change_nothing():
    assert order_of(asks("a", "b"), *results("b", "a", "b")) == "102", "partial and final results of one call"
    assert order_of(asks("a", "b"), *results("b", "x")) == "01" and order_of(asks("call_123456"), *results("call_1234")) == "0"


def test_a_system_column_is_the_system_message(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    for rows in ([USER, ANSWER], [system, USER, ANSWER]):
        (row,) = read(tmp_path / "rows.jsonl", {"messages": rows, "system": "Be brief."})
        assert row.messages == [system, USER]
    with pytest.raises(InputError, match=r"row 0 has one system text in the column 'system' and another .*system_key: null"):
        read(tmp_path / "rows.jsonl", {"messages": [system, USER, ANSWER], "system": "Be kind."})
    (row,) = read(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER], "system": "Be kind."}, system_key=None)
    assert row.messages == [USER]
    file = lines(tmp_path / "traces.jsonl", {"task_id": 1, "reward": 1, "messages": [USER, ANSWER], "system": "Be brief."})
    assert trace_dataset(file, "none")[0].messages[0] == system


def test_the_older_function_call_is_a_call(tmp_path, tokenizer):
    old = {"role": "assistant", "content": "", "function_call": {"name": "book", "arguments": '{"seats": 2}'}}
    (row,) = read(tmp_path / "rows.jsonl", {"messages": [USER, old]})
    prompt = tokenizer.encode_prompt(row.messages)
    made = demonstration(row, PromptPair(prompt, prompt, has_privileged=False), tokenizer)
    assert '{"name": "book", "arguments": {"seats": 2}}' in tokenizer.decode(made.completion)
    trace = {"task_id": "a", "reward": 1.0, "messages": [USER, old, {"role": "function", "content": "booked"}, ANSWER]}
    (example,) = trace_dataset(lines(tmp_path / "traces.jsonl", trace))
    assert "book" in example.privileged and example.tools[0]["function"]["name"] == "book"
    with pytest.raises(InputError, match="has both 'function_call' and 'tool_calls'"):
        check_messages([old | {"tool_calls": [{"function": BOOK}]}], "row 0", "messages")


def test_nesting_without_end_in_calls_as_text_is_refused_and_in_arguments_stays_text():
    deep = "[" * 200_000
    with pytest.raises(InputError, match=r"messages\[0\] has 'tool_calls' that are text but not JSON \(maximum recursion"):
        check_messages([{"role": "assistant", "tool_calls": deep}], "row 0", "messages")
    (message,) = check_messages([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": deep}]}], "row 0", "messages")
    assert message["tool_calls"] == [{"name": "f", "arguments": deep}]


@pytest.mark.parametrize("arguments", ["", " ", None, "{}", {}])
def test_empty_arguments_are_no_arguments(arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    (message,) = check_messages([{"role": "assistant", "content": None, "tool_calls": [call]}], "row 0", "messages")
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


def test_nulls_of_a_table_are_removed_and_nulls_of_a_row_are_kept(tmp_path):
    tools = [tool("book", "seats", "integer"), tool("cancel", "id", "string")]
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": BOOK}]}], "tools": tools}
    (kept,) = read(tmp_path / "rows.jsonl", row, tools_key="tools")
    assert kept.tools == tools and kept.completion[0]["tool_calls"] == [{"function": BOOK}]
    datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "rows.parquet"))
    options = {"privileged_key": None, "completion": "after_last_user", "tools_key": "tools"}
    (cleaned,) = chat_dataset(str(tmp_path / "rows.parquet"), **options)
    assert [list(one["function"]["parameters"]["properties"]) for one in cleaned.tools] == [["seats"], ["id"]]
    assert cleaned.completion[0]["tool_calls"][0]["function"]["arguments"] == {"seats": 2}


PARAMETERS = {"type": "object", "properties": {"seats": {"type": "integer"}}}
SCHEMA = {"name": "book", "description": "Book a table.", "parameters": PARAMETERS}
GEMINI = {"type": "OBJECT", "properties": {"seats": {"type": "INTEGER"}}}


@pytest.mark.parametrize(
    "given",
    [
        SCHEMA,
        {"type": "function", **SCHEMA},
        {"name": "book", "description": "Book a table.", "input_schema": PARAMETERS, "cache_control": {"type": "ephemeral"}},
        {"functionDeclarations": [SCHEMA | {"parameters": GEMINI}]},
        {"function_declarations": [SCHEMA]},
    ],
    ids=["functions", "Responses", "Anthropic", "Gemini", "Gemini in Python"],
)
def test_tool_schemas_of_other_interfaces_become_those_of_the_chat_interface(tmp_path, given):
    ours = {"type": "function", "function": SCHEMA}
    for tools in ([given], json.dumps([given])):
        (row,) = read(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER], "tools": tools})
        assert row.tools == [ours]
    (row,) = read(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER], "tools": [ours | {"more": 1}, given]})
    assert row.tools == [ours | {"more": 1}, ours]


def test_gemini_declarations_of_one_tool_are_as_many_tools(tmp_path):
    tools = [{"functionDeclarations": [{"name": "book"}, {"name": "cancel"}]}]
    (row,) = read(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER], "tools": tools})
    assert [tool["function"]["name"] for tool in row.tools] == ["book", "cancel"]


@pytest.mark.parametrize(
    "given", [{"type": "web_search"}, {"function": {"description": "x"}}, {"name": " "}, {"functionDeclarations": [{}]}]
)
def test_a_tool_without_a_name_is_refused(tmp_path, given):
    with pytest.raises(InputError, match=r"rows.jsonl row 0: tools has a tool without a name \(\{.*leave the tool out"):
        read(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER], "tools": [given]})


def test_the_older_functions_are_tools_where_tools_are_absent_and_rows_with_calls_and_no_tools_are_said(tmp_path, caplog):
    called = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": BOOK}]}]}
    ours, other = [{"type": "function", "function": SCHEMA}], [tool("a", "b", "string")]
    rows = [called | {"functions": [SCHEMA]}, called | {"functions": json.dumps([SCHEMA])}]
    rows += [called | {"functions": [SCHEMA], "tools": other}]
    assert [row.tools for row in read(tmp_path / "rows.jsonl", *rows)] == [ours, ours, other] and not caplog.records
    for key in ("tools", None):
        found = read(tmp_path / "rows.jsonl", called | {"functions": "prose"}, rows[0], tools_key=key)
        assert [row.tools for row in found] == [None, ours if key else None]
    (said,) = caplog.messages
    assert "1 of 2 rows have tool calls and no tool schemas in 'tools' (first: rows.jsonl row 0)" in said
    trace = {"task_id": 1, "reward": 1, **rows[0]}
    assert trace_dataset(lines(tmp_path / "traces.jsonl", trace))[0].tools == ours


@pytest.mark.parametrize(
    ("content", "read_as"),
    [
        ('<tool_response>\n{"content": "ok"}\n</tool_response>\n', '{"content": "ok"}'),
        ("<tool_response>a\n\n</tool_response>", "a\n"),
        ("<tool_response>\n</tool_response>", ""),
        ("<tool_response>a</tool_response><tool_response>b</tool_response>", None),
        ("see <tool_response>a</tool_response>", None),
        ("ok", None),
    ],
)
def test_the_tags_of_a_result_that_templates_write_themselves_are_removed_once(content, read_as, tokenizer):
    results = [{"role": "tool", "content": content}, {"role": "user", "content": content}]
    result, user = check_messages(results, "row 0", "messages")
    assert result["content"] == (content if read_as is None else read_as) and user["content"] == content
    if read_as:
        shown = tokenizer.decode(tokenizer.encode_prompt([USER, asks("a"), result]))
        assert shown.count("<tool_response>") == 1


def test_a_saved_dataset_is_read_and_blank_values_count_as_absent(tmp_path):
    datasets.Dataset.from_list([{"messages": [USER]}] * 3).save_to_disk(str(tmp_path / "saved"))
    assert len(chat_dataset(str(tmp_path / "saved"), privileged_key=None)) == 3
    (row,) = read(tmp_path / "rows.jsonl", {"messages": [USER], "tools": [tool("a", "b", "string")]}, completion=None)
    blank = [{"messages": [USER], "tools": ""}, {"messages": [USER], "tools": json.dumps([tool("a", "b", "string")])}]
    assert [one.tools is None for one in read(tmp_path / "rows.jsonl", *blank, completion=None, tools_key="tools")] == [1, 0]
    (row,) = qa_dataset(lines(tmp_path / "qa.jsonl", {"question": "q", "answer": "1", "hint": " \n"}), privileged_key="hint")
    assert row.privileged is None


def test_a_class_is_its_name_and_not_its_number_also_in_lists_and_objects(tmp_path):
    kind = datasets.ClassLabel(names=["neg", "pos"])
    features = {"question": datasets.Value("string"), "answer": kind, "more": {"seen": datasets.Sequence(kind)}}
    features["more"]["count"] = datasets.Value("int64")
    rows = [{"question": f"q{n}", "answer": n, "more": {"seen": [1, 0], "count": 1}} for n in (1, 0, -1)]
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    for source in (tmp_path / "saved", tmp_path / "rows.parquet"):
        first, second = qa_dataset(str(source), privileged_key=None, split="train[:2]")
        assert (first.reference, second.reference) == ("pos", "neg")
        assert first.data["more"] == {"seen": ["pos", "neg"], "count": 1}
        with pytest.raises(InputError, match="row 2 has no value in 'answer'"):
            qa_dataset(str(source), privileged_key=None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"messages": "Z\xfcrich"}\n', r"line 1 holds the byte 0xfc, which is not UTF-8"),
        (b'{"messages": "a"}\n\n{"messages": ', r"line 3 is not valid JSON: Expecting value at character 14\)"),
        ('{"messages": "a"}\n'.encode("utf-16"), r"line 1 holds the byte 0xff, .* `iconv -f utf-16 -t utf-8 rows\.jsonl`"),
        (b'{"messages": "a"}\n{"messages": "Thanks \\ud83d"}\n', r"line 2: messages holds \\ud83d, half of a surrogate pair"),
        (b'{"messages": "a"}\n["b"]\n', r"line 2 is a list, not an object with named fields"),
        (b"", r"has no rows in the split 'train'; check dataset.source"),
    ],
)
def test_a_damaged_file_is_one_sentence_with_its_line(tmp_path, content, said):
    (tmp_path / "rows.jsonl").write_bytes(content)
    for build in (chat_dataset, trace_dataset):
        with pytest.raises(InputError, match=rf"dataset\.source .*rows\.jsonl.*{said}"):
            build(str(tmp_path / "rows.jsonl"))


# ------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("key", ["weight", "train", "loss_weight"])
def test_a_turn_of_weight_0_is_shown_and_not_learned(tmp_path, tokenizer, key):
    turns = [USER, {"role": "assistant", "content": "wrong", key: 0}, USER, ANSWER | {key: 1}]
    rows = read(tmp_path / "rows.jsonl", {"messages": turns}, completion="from_first_assistant")
    prompts = build_prompts(rows, tokenizer, PrivilegedPrompt(), max_new_tokens=0).prompts
    ((made,), _) = build_demonstrations(prompts, tokenizer, max_seq_len=10**6, on_overflow=None)
    own = [token for token, is_own in zip(made.completion, made.policy_mask, strict=True) if is_own]
    assert tokenizer.decode(own) == "Done.<|im_end|>" and "wrong" in tokenizer.decode(made.completion)
    assert sum(made.turn_policy_tokens) == len(own) and len(made.turn_policy_tokens) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"weight": 0.5}, r"weight is 0\.5; write 1 for a turn that is learned, or 0 for one"),
        ({"weight": 0, "train": True}, "weight and train contradict each other"),
        ({"loss_mask": 0}, "has the key 'loss_mask', which seems to say what is learned and is not read; write weight, train"),
        ({"role": "user", "train": True}, "train is True on a user message; only assistant messages are learned"),
    ],
)
def test_weights_that_cannot_be_honoured_are_refused(fields, said):
    with pytest.raises(InputError, match=rf"row 0: messages\[0\].*{said}"):
        check_messages([ANSWER | fields], "row 0", "messages")


def test_a_field_that_does_not_say_what_is_learned_is_kept():
    messages = [USER | {"train_id": 5, "loss_group": "b"}, ANSWER | {"train_id": 6}]
    assert check_messages(messages, "row 0", "messages") == messages
    with pytest.raises(InputError, match="has the key 'masked', which seems to say"):
        check_messages([USER | {"masked": True}, ANSWER], "row 0", "messages")


def test_a_row_of_which_nothing_is_learned_is_refused(tmp_path, tokenizer):
    (row,) = read(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER | {"weight": 0}]})
    with pytest.raises(InputError, match="row 0: every assistant turn has weight 0"):
        demonstration(row, PromptPair([1], [1], has_privileged=False), tokenizer)
