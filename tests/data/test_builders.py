"""Test how rows become examples and prompts, and the sentence for each mistake in them."""

import json
import os
import re
import socket
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pidistill.data import ExampleDataset, build_prompts, chat_dataset, epoch_order, gsm8k_dataset, qa_dataset
from pidistill.data.builders import split_gsm8k_answer
from pidistill.errors import InputError
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.tokenizers import HFChatTokenizer, WordTokenizer
from pidistill.types import Example
from tests.support.tiny_tokenizers import llama_folder, qwen_folder

REAL = os.environ.get("PIDISTILL_TEST_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="PIDISTILL_TEST_DATA names no folder with the real rows")


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local source was looked up in the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------ sources


ROWS = [{"question": f"q{i}", "answer": str(i), "extra_info": {"privileged_context": f"pi{i}"}} for i in range(5)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_files_globs_and_folders_give_the_same_rows_without_network(tmp_path, no_network, suffix):
    file = write(tmp_path / "folder" / f"rows.{suffix}", ROWS)
    whole = qa_dataset(file)
    assert [(e.messages, e.reference, e.privileged) for e in whole] == [([user(f"q{i}")], str(i), f"pi{i}") for i in range(5)]
    assert [e.id for e in whole] == [f"rows.{suffix} row {i}" for i in range(5)] and whole.dropped == {}
    for source in (str(tmp_path / "folder" / "*"), str(tmp_path / "folder")):
        assert [e.messages for e in qa_dataset(source)] == [e.messages for e in whole]
    assert len(qa_dataset(file, max_rows=2)) == 2 and len(qa_dataset(file, max_rows=99)) == 5
    assert [e.messages for e in qa_dataset(file, split="test[1:3]")] == [e.messages for e in whole][1:3]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_more_rows_asked_for_than_there_are_is_said(tmp_path, no_network, caplog, suffix):
    file = write(tmp_path / f"rows.{suffix}", ROWS)
    for most in (None, 4, 5):
        qa_dataset(file, max_rows=most)
    assert not caplog.records
    assert len(qa_dataset(file, max_rows=6)) == 5
    assert [record.getMessage() for record in caplog.records] == [f"dataset.max_rows=6, and {file} has 5 rows; all are taken"]


def test_a_folder_with_files_of_several_types_gets_a_warning(tmp_path, no_network, caplog):
    write(tmp_path / "rows" / "a.parquet", ROWS)
    (tmp_path / "rows" / "about.json").write_text("{}")
    qa_dataset(str(tmp_path / "rows"))
    assert "only one type is read" not in caplog.text
    write(tmp_path / "rows" / "b.jsonl", ROWS[:1])
    assert len(qa_dataset(str(tmp_path / "rows"))) < len(ROWS) + 1
    assert (
        "has files of type .jsonl, .parquet, of which only one type is read; name the files in dataset.data_files"
        in caplog.text
    )
    caplog.clear()
    qa_dataset(str(tmp_path / "rows"), data_files=["a.parquet"])
    assert "only one type is read" not in caplog.text


def test_several_files_are_read_in_order_and_relative_paths_start_here(tmp_path, monkeypatch, no_network):
    for i, row in enumerate(ROWS):
        write(tmp_path / f"part{i}.jsonl", [row])
    monkeypatch.chdir(tmp_path)
    assert [e.reference for e in qa_dataset("part*.jsonl")] == list("01234")
    assert qa_dataset("part3.jsonl")[0].reference == "3"


def test_a_file_that_changed_is_read_again(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    assert len(qa_dataset(file)) == 5
    write(tmp_path / "rows.jsonl", ROWS[:3])
    assert len(qa_dataset(file)) == 3


def test_sources_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"dataset\.source nowhere\.jsonl does not exist; relative paths start at the working"):
        qa_dataset("nowhere.jsonl")
    with pytest.raises(InputError, match=r"none\*\.parquet does not exist"):
        qa_dataset(str(tmp_path / "none*.parquet"))
    write(tmp_path / "mixed" / "a.jsonl", ROWS)
    write(tmp_path / "mixed" / "b.parquet", ROWS)
    with pytest.raises(InputError, match=r"files of type \.jsonl, \.parquet; give one type of \.jsonl, \.json, \.parquet"):
        qa_dataset(str(tmp_path / "mixed" / "*"))
    (tmp_path / "rows.txt").write_text("a,b\n")
    with pytest.raises(InputError, match=r"files of type \.txt; give one type of"):
        qa_dataset(str(tmp_path / "rows.txt"))
    (tmp_path / "broken.jsonl").write_text('{"question": \n')
    with pytest.raises(InputError, match=r"broken\.jsonl cannot be loaded \(.+\); check the file"):
        qa_dataset(str(tmp_path / "broken.jsonl"))
    with pytest.raises(InputError, match=r"dataset\.max_rows=0 must be at least 1"):
        qa_dataset("nowhere.jsonl", max_rows=0)
    file = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(InputError, match=r"rows\.jsonl has no rows in the split 'train\[:0\]'"):
        qa_dataset(file, split="train[:0]")

    def offline(*args, **kwargs):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"dataset\.source some/name cannot be loaded \(no network\); it is no file or folder"):
        qa_dataset("some/name")


def write_csv(path, text):
    path.write_text(text, newline="")
    return str(path)


HEADER = "question,answer,hint\n"


def test_a_csv_file_may_have_line_breaks_quotes_long_cells_and_empty_lines(tmp_path):
    long = "x" * 200_000
    text = HEADER + '\n"two\r\nlines, ""quoted""",01234,NA\n\n' + f"q,5,{long}\n" + "q,6,\n\n"
    rows = qa_dataset(write_csv(tmp_path / "rows.csv", text), privileged_key="hint")
    assert [row.messages[0]["content"] for row in rows] == ['two\r\nlines, "quoted"', "q", "q"]
    assert [(row.reference, row.privileged) for row in rows] == [("01234", "NA"), ("5", long), ("6", None)]


def test_a_csv_file_may_be_written_as_spreadsheets_write_it(tmp_path):
    text = "question,answer,hint,,\nq,1,h,,\nr,2\n  \ns,3,,,,,\n"
    rows = qa_dataset(write_csv(tmp_path / "rows.csv", text), privileged_key="hint")
    assert [(row.reference, row.privileged) for row in rows] == [("1", "h"), ("2", None), ("3", None)]
    assert set(rows[0].data) == {"question", "answer", "hint"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEADER + 'q1,7,h1\nq2,8,"he said: h2\nq3,9,h3\n', r"unexpected end of data in the row that starts on line 3\)"),
        (HEADER + '"q\n1",7,h1\nq2,8,"he said"h2\n', r"expected after '\"' in the row that starts on line 4\)"),
        (HEADER + '"q\n1",7,h1\n\nq2,8,first, then\n', r" line 5 has 4 cells and the header has 3; put a text"),
        (HEADER + "q1,7,h1\nsplit\n", r" line 3 has 1 cells and the header has 3"),
        ("question;answer;hint\nq, or r;1;h\n", r" separates its columns by ';'; save it with commas"),
        ("question,answer,hint,answer\nq,1,h,2\n", r" has 2 columns with the name 'answer' in its header; give each"),
    ],
    ids=["open quote", "stray quote", "comma", "line break", "semicolons", "header"],
)
def test_a_csv_file_that_would_be_misread_is_refused_with_its_line(tmp_path, text, said):
    with pytest.raises(InputError, match=rf"dataset\.source .*rows\.csv.*{said}"):
        qa_dataset(write_csv(tmp_path / "rows.csv", text), privileged_key="hint")


def test_a_folder_keeps_the_texts_of_its_files_and_their_splits(tmp_path, no_network):
    for folder, suffix in (("json", "jsonl"), ("csv", "csv")):
        for part, answers in (("train", ["1999-05-04", "01234", "NA"]), ("test", ["2001-10-11"])):
            file = tmp_path / folder / f"{part}.{suffix}"
            write(file, [{"question": "q", "answer": answer} for answer in answers])
            if suffix == "csv":
                write_csv(file, "question,answer\n" + "".join(f"q,{answer}\n" for answer in answers))
        for split, expected in {
            "train": ["1999-05-04", "01234", "NA"],
            "test": ["2001-10-11"],
            "train[1:]": ["01234", "NA"],
            "train[:34%] + test": ["1999-05-04", "2001-10-11"],
            "all": ["1999-05-04", "01234", "NA", "2001-10-11"],
        }.items():
            rows = qa_dataset(str(tmp_path / folder), privileged_key=None, split=split)
            assert [row.reference for row in rows] == expected
        (row,) = qa_dataset(str(tmp_path / folder), privileged_key=None, data_files=f"test.{suffix}")
        assert row.reference == "2001-10-11"
        with pytest.raises(InputError, match=r"has the splits train, test, and not 'dev'; set dataset\.split"):
            qa_dataset(str(tmp_path / folder), privileged_key=None, split="dev")


def test_a_folders_card_says_which_files_are_a_split_and_how_they_are_read(tmp_path, no_network):
    write(tmp_path / "rows" / "a.jsonl", [{"question": "q", "answer": "01"}])
    write(tmp_path / "rows" / "b.jsonl", [{"question": "q", "answer": "1999-05-04"}])
    (tmp_path / "rows" / "README.md").write_text("---\nconfigs:\n- config_name: late\n  data_files: b.jsonl\n---\n")
    (row,) = qa_dataset(str(tmp_path / "rows"), privileged_key=None, config_name="late")
    assert row.reference == "1999-05-04"
    (tmp_path / "table").mkdir()
    write_csv(tmp_path / "table" / "rows.csv", "question;answer\nq;yes\n")
    card = '---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n  sep: ";"\n---\n'
    (tmp_path / "table" / "README.md").write_text(card)
    assert qa_dataset(str(tmp_path / "table"), privileged_key=None)[0].reference == "yes"


def test_a_list_of_rows_is_read_under_the_suffix_of_json_lines_too(tmp_path):
    for name, indent in (("indented.jsonl", 1), ("one_line.jsonl", None)):
        (tmp_path / name).write_text("\ufeff\n" + json.dumps(ROWS, indent=indent) + "\n\n", encoding="utf-8")
        assert [e.reference for e in qa_dataset(str(tmp_path / name))] == [row["answer"] for row in ROWS]


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match=r"empty\.jsonl"):
        qa_dataset(str(tmp_path / "empty.jsonl"))
    datasets.Dataset.from_dict({"question": [], "answer": []}).to_parquet(str(tmp_path / "empty.parquet"))
    with pytest.raises(InputError, match=r"empty\.parquet has no rows in the split 'train'; check dataset\.source"):
        qa_dataset(str(tmp_path / "empty.parquet"))


# ------------------------------------------------------------------------------------------------ questions and answers


def test_rows_in_verls_layout_are_read_with_dotted_keys(tmp_path):
    row = {
        "prompt": [{"role": "system", "content": "s"}, user("q")],
        "reward_model": {"ground_truth": "72", "style": "rule"},
        "extra_info": {"privileged_context": "pi", "index": 0},
    }
    bare = row | {"prompt": [user("q")], "extra_info": {"privileged_context": None, "index": 1}}
    keys = {"question_key": "prompt", "answer_key": "reward_model.ground_truth"}
    for suffix in ("jsonl", "parquet"):
        first, second = qa_dataset(write(tmp_path / f"rows.{suffix}", [row, bare]), system_prompt="mine", **keys)
        assert first.messages == row["prompt"] and first.reference == "72" and first.privileged == "pi"
        assert second.messages == [{"role": "system", "content": "mine"}, user("q")] and second.privileged is None
        assert first.data["extra_info"]["index"] == 0


def test_question_template_system_prompt_and_completion_shape_the_rows(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"q": "2 {x}?", "a": 4, "demo": "It is 4.", "dotted.key": "pi"}])
    (example,) = qa_dataset(
        file,
        question_key="q",
        answer_key="a",
        privileged_key="dotted.key",
        completion_key="demo",
        system_prompt="s",
        question_template="{question} Use \\boxed{{}}.",
    )
    assert example.messages == [{"role": "system", "content": "s"}, user("2 {x}? Use \\boxed{}.")]
    assert (example.reference, example.privileged, example.completion) == (4, "pi", [assistant("It is 4.")])
    for template in ("no", "{answer}", "{question} {", "{question} {}"):
        with pytest.raises(InputError, match=r"dataset\.question_template"):
            qa_dataset(file, question_key="q", question_template=template)


def test_questions_with_columns_of_system_text_and_tools_show_both(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    bare, full = ROWS[0] | {"system": "", "tools": None}, ROWS[1] | {"system": "In French.", "tools": tools}
    file = write(tmp_path / "rows.jsonl", [bare, full])
    first, second = qa_dataset(file, system_prompt="mine")
    assert first.messages == [{"role": "system", "content": "mine"}, user("q0")] and first.tools is None
    assert second.messages == [{"role": "system", "content": "In French."}, user("q1")] and second.tools == tools
    assert [(e.messages, e.tools) for e in qa_dataset(file, system_key=None, tools_key=None)] == [
        ([user("q0")], None),
        ([user("q1")], None),
    ]
    with pytest.raises(InputError, match=r"rows\.jsonl has no column 'schemas' with values .*; set dataset\.tools_key"):
        qa_dataset(file, tools_key="schemas")


def test_a_flat_schema_keeps_what_else_it_says_and_other_functions_are_no_tools(tmp_path):
    flat = {"type": "function", "name": "f", "arguments": {"type": "object"}, "parameters_json_schema": {"type": "object"}}
    code = [{"name": "foo", "code": "def foo(): pass"}]
    file = write(tmp_path / "rows.jsonl", [ROWS[0] | {"tools": [flat]}, ROWS[1] | {"tools": None, "functions": code}])
    first, second = qa_dataset(file)
    function = {"name": "f", "arguments": {"type": "object"}, "parameters": {"type": "object"}}
    assert first.tools == [{"type": "function", "function": function}] and second.tools is None
    text = write(tmp_path / "text.jsonl", [ROWS[0] | {"tools": "web browser"}])
    with pytest.raises(InputError, match=r"or set dataset\.tools_key: null, which ignores the column"):
        qa_dataset(text)


def test_names_with_dots_are_found_at_every_level(tmp_path):
    rows = [{"question": "q", "answer": "1", "meta": {"sol.full": "pi", "a.b": {"c.d": "deep"}}}]
    file = write(tmp_path / "rows.jsonl", rows)
    assert [qa_dataset(file, privileged_key=key)[0].privileged for key in ("meta.sol.full", "meta.a.b.c.d")] == ["pi", "deep"]
    with pytest.raises(InputError, match=r"no column 'meta\.sol' with values \(it has: .*meta\.sol\.full, meta\.a\.b\.c\.d\)"):
        qa_dataset(file, privileged_key="meta.sol")


@pytest.mark.parametrize(
    "option, keys",
    [
        ("question_key", {"question_key": "ask"}),
        ("answer_key", {"answer_key": "extra_info.truth"}),
        ("privileged_key", {"privileged_key": "extra_info.pi"}),
        ("completion_key", {"completion_key": "demo"}),
    ],
)
def test_missing_columns_are_named_with_those_there_are(tmp_path, option, keys):
    columns = r"\(it has: question, answer, extra_info\.privileged_context\)"
    name = next(iter(keys.values())).replace(".", r"\.")
    with pytest.raises(InputError, match=rf"rows\.jsonl has no column '{name}' with values {columns}; set dataset\.{option}"):
        qa_dataset(write(tmp_path / "rows.jsonl", ROWS), **keys)


def test_a_row_may_lack_privileged_information_but_not_its_question_or_answer(tmp_path):
    rows = [ROWS[0], ROWS[1] | {"extra_info": {}}, ROWS[2] | {"extra_info": {"privileged_context": ""}}]
    assert [e.privileged for e in qa_dataset(write(tmp_path / "a.jsonl", rows))] == ["pi0", None, None]
    for key, value in (("question", None), ("question", ""), ("question", " \n"), ("answer", None)):
        file = write(tmp_path / f"{key}.jsonl", [ROWS[0], ROWS[1] | {key: value}])
        with pytest.raises(InputError, match=rf"{key}\.jsonl row 1 has no value in '{key}'; .*dataset\.{key}_key"):
            qa_dataset(file)
    with pytest.raises(InputError, match=r"row 1 has no value in 'question'; .*dataset\.messages_key"):
        chat_dataset(write(tmp_path / "c.jsonl", [ROWS[0], {"question": " "}]), messages_key="question", privileged_key=None)
    assert qa_dataset(write(tmp_path / "b.jsonl", ROWS), answer_key=None, privileged_key=None)[0].reference is None


def test_words_for_no_value_as_privileged_information_are_said_once_and_kept(tmp_path, caplog):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,hint\na,1,Nancy\nb,2,NaN\nc,3,None\nd,4,NULL\ne,5,\n")
    assert [e.privileged for e in qa_dataset(str(path), privileged_key="hint")] == ["Nancy", "NaN", "None", "NULL", None]
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 5 rows have a word for no value as privileged information, the first is rows.csv row 1 (hint: 'NaN'), and the "
        "teacher is shown the word; write null, or an empty cell, where a row has none"
    ]
    caplog.clear()
    rows = [{"messages": "q", "hint": word} for word in ("nan", "null", "N/A", "na")]
    chat_dataset(write(tmp_path / "rows.jsonl", rows), privileged_key="hint")
    assert [record.getMessage()[:12] for record in caplog.records] == ["3 of 4 rows "]


EMPTY = [{"role": "assistant", "content": " "}]


@pytest.mark.parametrize("value", ["", "  ", [], {}, "[]", None, EMPTY, json.dumps(EMPTY)], ids=repr)
def test_an_empty_value_is_no_privileged_information(tmp_path, value):
    rows = [ROWS[0] | {"hint": "h"}, ROWS[1] | {"hint": value}]
    shown = [e.privileged for e in qa_dataset(write(tmp_path / "rows.jsonl", rows), privileged_key="hint")]
    assert shown == ["h", "[]" if value == "[]" else None]


@pytest.mark.parametrize("value", [0, False, 4, float("nan"), {"platform": 4}, ["Platform 4.", "Near the stairs."]], ids=repr)
def test_privileged_information_that_is_no_text_and_no_messages_is_refused_with_its_value(tmp_path, value):
    file = write(tmp_path / "rows.jsonl", [ROWS[0] | {"hint": "h"}, ROWS[1] | {"hint": value}])
    sentence = rf"rows\.jsonl row 1: hint is {re.escape(repr(value))}; privileged information is one text or a list of messages"
    with pytest.raises(InputError, match=sentence):
        qa_dataset(file, privileged_key="hint")


# ------------------------------------------------------------------------------------------------ conversations


FUNCTION = {"name": "look", "arguments": '{"dept": "d2", "n": null}'}
TRACE = [
    {"role": "system", "content": "s"},
    user("a"),
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]},
    {"role": "tool", "content": "6", "tool_call_id": "1"},
    assistant("is it?"),
    user("yes"),
    assistant("done"),
    user("###STOP###"),
]


def test_rows_of_messages_keep_privileged_messages_reference_tools_and_id(tmp_path):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    rows = [
        {"messages": [user("a")], "privileged_messages": [user("pi")], "ref": "1", "tools": json.dumps(tools), "id": 5},
        {"messages": [user("b")], "privileged_messages": None, "ref": None, "tools": None, "id": 6},
    ]
    first, second = chat_dataset(write(tmp_path / "rows.jsonl", rows), reference_key="ref")
    assert first.messages == [user("a")] and first.privileged == [user("pi")] and first.completion is None
    assert first.reference == "1" and first.tools == tools and first.data["id"] == 5 and first.id == "rows.jsonl row 0"
    assert second.privileged is None and second.reference is None and second.tools is None
    assert chat_dataset(str(tmp_path / "rows.jsonl"), tools_key=None)[0].tools is None


@pytest.mark.parametrize(
    "completion, prompt_length, completion_length", [("after_last_user", 6, 1), ("from_first_assistant", 2, 5)]
)
def test_a_conversation_is_split_into_prompt_and_demonstration(tmp_path, completion, prompt_length, completion_length):
    rows = [{"messages": TRACE}, {"messages": [user("a"), assistant("b")]}]
    first, second = chat_dataset(write(tmp_path / "r.jsonl", rows), privileged_key=None, completion=completion)
    assert (len(first.messages), len(first.completion)) == (prompt_length, completion_length)
    assert first.completion[0]["role"] == first.completion[-1]["role"] == "assistant"
    assert (first.messages + first.completion)[-1] == assistant("done")
    assert (second.messages, second.completion) == ([user("a")], [assistant("b")])


def test_fields_that_files_fill_with_null_are_removed_and_arguments_are_objects(tmp_path):
    for suffix in ("jsonl", "parquet"):
        file = write(tmp_path / f"rows.{suffix}", [{"messages": TRACE}])
        (example,) = chat_dataset(file, privileged_key=None, completion="from_first_assistant")
        assert example.messages == TRACE[:2]
        call = example.completion[0]
        assert "content" not in call and call["tool_calls"][0]["function"]["arguments"] == {"dept": "d2", "n": None}


def test_columns_of_prompt_and_completion_are_read(tmp_path):
    rows = [
        {"prompt": [user("a")], "completion": [assistant("b")], "pi": "x"},
        {"prompt": [user("c")], "completion": None, "pi": None},
    ]
    keys = {"messages_key": "prompt", "completion_key": "completion", "privileged_key": "pi"}
    first, second = chat_dataset(write(tmp_path / "rows.jsonl", rows), **keys)
    assert (first.messages, first.completion, first.privileged) == ([user("a")], [assistant("b")], "x")
    assert second.completion is None and second.privileged is None
    texts = [{"prompt": "a", "completion": "b", "pi": "x"}, {"prompt": "c", "completion": "", "pi": "x"}]
    text, blank = chat_dataset(write(tmp_path / "text.jsonl", texts), **keys)
    assert (text.messages, text.completion) == ([user("a")], [assistant("b")]) and blank.completion is None
    rows = [ROWS[0] | {"demo": "d"}, ROWS[1] | {"demo": " \n"}]
    demos = [e.completion for e in qa_dataset(write(tmp_path / "qa.jsonl", rows), completion_key="demo")]
    assert demos == [[assistant("d")], None]


MALFORMED = {
    "a list": ({"role": "user"}, r"messages is a dict, not a list of messages"),
    "not empty": ([], r"messages is empty, not a list"),
    "of messages": ([user("a"), "b"], r"messages\[1\] is a str, not a message like"),
    "with a role": ([{"content": "a"}], r"messages\[0\] has no 'role' \(it has: content\)"),
    "with content": ([user("a"), {"role": "tool", "name": "x"}], r"messages\[1\] has no 'content'"),
    "with content unless it calls": ([user("a"), assistant(None), user("b")], r"messages\[1\] has no 'content'"),
    "of a known role": ([{"role": "human", "content": "a"}], r"messages\[0\] has the unknown role 'human'; known roles are"),
    "of text": ([user(3)], r"messages\[0\] has a 'content' of type int"),
    "of text parts": ([user([{"type": "image", "url": "x"}])], r"messages\[0\] has a content part that is not text \(\{'type"),
    "that calls something": (
        [user("a"), assistant("", tool_calls=[{"id": "1"}]), user("b")],
        r"messages\[1\] has a tool call without a function name",
    ),
    "ending before an assistant turn": (
        [user("a"), assistant("b")],
        "messages ends with an assistant message, .*after_last_user",
    ),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_messages_are_named_by_row_and_field(tmp_path, what):
    messages, sentence = MALFORMED[what]
    file = write(tmp_path / "rows.jsonl", [{"messages": [user("fine")]}, {"messages": messages}])
    with pytest.raises(InputError, match=rf"^rows\.jsonl row 1: {sentence}"):
        chat_dataset(file, privileged_key=None)


def test_wrong_options_of_chat_rows_are_refused(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"messages": [user("a")], "pi": [user("p")], "tools": "no json", "tools2": [3]}])

    def refused(sentence, **options):
        with pytest.raises(InputError, match=sentence):
            chat_dataset(file, **({"privileged_key": None} | options))

    refused(
        r"no column 'privileged_messages' with values \(it has: messages, pi, tools, tools2\); set .*privileged_key, or null",
        privileged_key="privileged_messages",
    )
    refused("no column 'prompt'.*set dataset.messages_key", messages_key="prompt")
    refused("no column 'ref'.*set dataset.reference_key", reference_key="ref")
    refused("dataset.completion=last is unknown; choose one of null, after_last_user, from_first_assistant", completion="last")
    refused("exclude each other", completion="after_last_user", completion_key="pi")
    refused("row 0: messages has no assistant message, which dataset.completion", completion="after_last_user")
    refused("row 0: pi must begin and end with an assistant message", completion_key="pi")
    refused("row 0: tools is text but not JSON", tools_key="tools")
    refused("row 0: tools2 is not a list of tool schemas", tools_key="tools2")
    odd = write(tmp_path / "odd.jsonl", [{"messages": [assistant("a"), user("b")]}])
    with pytest.raises(InputError, match=r"row 0: messages: no assistant message follows the last user message directly"):
        chat_dataset(odd, privileged_key=None, completion="from_first_assistant")
    bad = write(tmp_path / "bad.jsonl", [{"messages": [user("a")], "pi": [{"role": "oracle", "content": "p"}]}])
    with pytest.raises(InputError, match=r"row 0: pi\[0\] has the unknown role 'oracle'"):
        chat_dataset(bad, privileged_key="pi")


# ------------------------------------------------------------------------------------------------ GSM8K


GSM8K = [
    {"question": "How many?", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72.\n#### 72"},
    {"question": "How much?", "answer": "It is $<<1000+234=1234>>1,234.\n#### 1,234"},
    {"question": "How cold?", "answer": "Below 0.\n#### -5.5"},
]
SOLUTION = "She sold 48/2 = 24 clips.\n48+24 = 72."


def test_gsm8k_rows_give_question_solution_and_reference(tmp_path):
    file = write(tmp_path / "gsm8k.jsonl", GSM8K)
    boxed, hashes = gsm8k_dataset(file), gsm8k_dataset(file, privileged="answer", answer_format="hashes", system_prompt="s")
    assert [e.reference for e in boxed] == ["72", "1234", "-5.5"]
    assert boxed[0].messages[0]["content"].startswith("How many?\n\n") and "\\boxed{}" in boxed[0].messages[0]["content"]
    assert boxed[0].privileged == f"{SOLUTION}\nThe final answer is 72."
    assert boxed[0].completion == [assistant(f"{SOLUTION}\nThe final answer is \\boxed{{72}}.")]
    assert hashes[0].messages[0] == {"role": "system", "content": "s"} and "####" in hashes[0].messages[1]["content"]
    assert hashes[0].privileged == "The final answer is 72." and hashes[0].completion == [assistant(f"{SOLUTION}\n#### 72")]
    assert [e.privileged for e in gsm8k_dataset(file, privileged="none")] == [None] * 3
    assert len(gsm8k_dataset(file, max_rows=1)) == 1


def test_wrong_options_and_rows_of_gsm8k_are_refused_in_one_sentence(tmp_path):
    file = write(tmp_path / "gsm8k.jsonl", GSM8K)
    with pytest.raises(InputError, match=r"dataset\.privileged=hint is unknown; choose one of solution, answer, none"):
        gsm8k_dataset(file, privileged="hint")
    with pytest.raises(InputError, match=r"dataset\.answer_format=json is unknown; choose one of boxed, hashes"):
        gsm8k_dataset(file, answer_format="json")
    with pytest.raises(InputError, match=r"other\.jsonl has no column 'answer'.*pidistill\.data\.qa_dataset"):
        gsm8k_dataset(write(tmp_path / "other.jsonl", [{"question": "q", "reply": "a"}]))
    wrong = write(tmp_path / "wrong.jsonl", [*GSM8K, {"question": "q", "answer": "It is 3."}])
    with pytest.raises(InputError, match=r"wrong\.jsonl row 3: answer does not end with '#### N' \('It is 3\.'\)"):
        gsm8k_dataset(wrong)


@needs_data
def test_every_published_gsm8k_row_has_its_question_solution_and_reference():
    rows = [json.loads(line) for line in (Path(REAL) / "gsm8k_train.jsonl").read_text().splitlines()]
    examples = gsm8k_dataset(str(Path(REAL) / "gsm8k_train.jsonl"))
    assert len(examples) == len(rows) == 7473
    for example, row in zip(examples, rows, strict=True):
        assert row["question"] in example.messages[0]["content"]
        assert "<<" not in example.privileged and "####" not in example.privileged
        assert example.reference == row["answer"].split("####")[1].strip().replace(",", "")
        assert split_gsm8k_answer(row["answer"], "row")[0] in example.completion[0]["content"]


@needs_data
@pytest.mark.parametrize("make", [qwen_folder, llama_folder])
def test_real_tool_conversations_grow_turn_by_turn_into_their_prompts(tmp_path, make):
    from transformers import PreTrainedTokenizerFast

    folder = make(tmp_path)
    tokenizer, hf = HFChatTokenizer(str(folder)), PreTrainedTokenizerFast.from_pretrained(folder)
    path = str(Path(REAL) / "tau_bench_airline_gpt4o.jsonl")
    examples = chat_dataset(path, privileged_key=None, completion="from_first_assistant", reference_key="reward", max_rows=6)
    for example in examples:
        history, ids, observations = list(example.messages), tokenizer.encode_prompt(example.messages), []
        for message in example.completion:
            if message["role"] != "assistant":
                observations.append(message)
                continue
            if observations:
                ids += tokenizer.encode_observations(history, observations)
                history, observations = history + observations, []
            assert ids == hf.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
            ids += tokenizer.encode_turn(history, message)
            history.append(message)
        assert len(history) > 6 and ids[-1] in tokenizer.stop_ids


# ------------------------------------------------------------------------------------------------ order


@settings(deadline=None)
@given(n=st.integers(1, 30), seed=st.integers(0, 5), start=st.integers(0, 100), count=st.integers(0, 70))
def test_order_is_a_stretch_of_one_endless_sequence_of_permutations(n, seed, start, count):
    whole = epoch_order(n, seed, 0, 200)
    assert epoch_order(n, seed, start, count) == whole[start : start + count]
    for epoch in range(200 // n):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_order_differs_between_epochs_and_seeds():
    epochs = {tuple(epoch_order(50, seed, epoch * 50, 50)) for seed in range(3) for epoch in range(3)}
    assert len(epochs) == 9 and tuple(range(50)) not in epochs
    with pytest.raises(InputError, match="no rows to order"):
        epoch_order(0, 0, 0, 1)


# ------------------------------------------------------------------------------------------------ prompts


@pytest.fixture
def words():
    return WordTokenizer(["<pad>", "<bos>", "end", *"abcd"], pad="<pad>", bos="<bos>", end="end", max_seq_len=12)


def row(number, question, privileged):
    return Example(f"rows.jsonl row {number}", [user(question)], privileged=privileged)


PLAIN = PrivilegedPrompt(template="{privileged}")


def test_prompts_keep_rows_in_order_with_their_own_pair(words):
    dataset = ExampleDataset([row(0, "a", "b"), row(1, "c", None)], dropped={"unsolved": 3})
    built = build_prompts(dataset, words, PLAIN, max_new_tokens=4)
    assert [example for example, _ in built.prompts] == list(dataset)
    assert [(p.student, p.teacher) for _, p in built.prompts] == [([1, 3], [1, 4, 3]), ([1, 5], [1, 5])]
    assert built.dropped == {"unsolved": 3} and built.rows_without_pi == 1


def test_rows_without_information_are_kept_dropped_or_refused(words):
    rows = [row(0, "a", "b"), row(1, "c", None), row(2, "d", "")]
    for no_pi in ("rl", "distill"):
        built = build_prompts(rows, words, PLAIN, max_new_tokens=1, no_pi=no_pi)
        assert len(built.prompts) == 3 and built.rows_without_pi == 2 and built.dropped == {}
    built = build_prompts(rows, words, PLAIN, max_new_tokens=1, no_pi="drop")
    assert [e.id for e, _ in built.prompts] == ["rows.jsonl row 0"]
    assert built.dropped == {"rows_without_pi": 2} and built.rows_without_pi == 2
    sentence = r"rows\.jsonl row 1 has no privileged information and no_pi is error; fill the row, or set objective\.no_pi=drop"
    with pytest.raises(InputError, match=sentence):
        build_prompts(rows, words, PLAIN, max_new_tokens=1, no_pi="error")
    with pytest.raises(InputError, match="none of the 2 rows has privileged information, so no_pi: drop leaves nothing"):
        build_prompts(rows[1:], words, PLAIN, max_new_tokens=1, no_pi="drop")
    control = PrivilegedPrompt(template="{privileged}", control="none")
    with pytest.raises(InputError, match=r"\(privileged\.control: none takes it from every row\), so no_pi: drop"):
        build_prompts(rows, words, control, max_new_tokens=1, no_pi="drop")


def test_a_prompt_that_is_too_long_is_refused_with_its_numbers(words):
    rows = [row(0, "a", "b"), row(17, "a b c", "d d d d"), row(18, "a " * 9, None)]
    sentence = (
        r"^example rows\.jsonl row 17: teacher prompt \(question 4 \+ privileged 4 tokens\) plus completion 5 exceeds "
        r"max_seq_len 12 by 1; raise `tokenizer\.max_seq_len`, .*or set `privileged\.on_overflow: drop`$"
    )
    assert len(build_prompts(rows[:2], words, PLAIN, max_new_tokens=4).prompts) == 2  # 12 of 12
    with pytest.raises(InputError, match=sentence):
        build_prompts(rows, words, PLAIN, max_new_tokens=5)
    with pytest.raises(InputError, match=r"row 18: prompt \(10 tokens\) plus completion 5 exceeds max_seq_len 12 by 3"):
        build_prompts(rows[2:], words, PLAIN, max_new_tokens=5)
    with pytest.raises(InputError, match="exceeds max_seq_len 11 by 1"):
        build_prompts(rows[:2], words, PLAIN, max_new_tokens=4, max_seq_len=11)
    built = build_prompts(rows, words, PLAIN, max_new_tokens=5, on_overflow="drop")
    assert [e.id for e, _ in built.prompts] == ["rows.jsonl row 0"] and built.dropped == {"prompt_too_long": 2}
    with pytest.raises(InputError, match=r"none of the 2 rows is left \(prompt_too_long 2\)"):
        build_prompts(rows[1:], words, PLAIN, max_new_tokens=5, on_overflow="drop")


def test_too_long_information_is_dropped_and_counted_under_its_own_name(words):
    rows = [row(0, "a", "b"), row(1, "a", "b c d")]
    limited = PrivilegedPrompt(template="{privileged}", max_privileged_length=2, on_overflow="drop")
    built = build_prompts(rows, words, limited, max_new_tokens=1)
    assert len(built.prompts) == 1 and built.dropped == {"privileged_too_long": 1}
    with pytest.raises(InputError, match=r"row 1: privileged information of 3 tokens .* exceeds .* 2 by 1"):
        build_prompts(rows, words, limited, max_new_tokens=1, on_overflow="error")


def test_unknown_policies_are_refused(words):
    for policy in ({"no_pi": "skip"}, {"on_overflow": "truncate"}):
        with pytest.raises(
            InputError, match=r"(no_pi=skip is unknown; choose one of rl, distill, drop, error|on_overflow=truncate is unknown)"
        ):
            build_prompts([row(0, "a", "b")], words, PLAIN, max_new_tokens=1, **policy)


@needs_data
def test_no_real_solution_reaches_a_students_prompt(tmp_path):
    examples = gsm8k_dataset(str(Path(REAL) / "gsm8k_test_400.jsonl"))
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path)), max_seq_len=4096)
    built = build_prompts(examples, tokenizer, PrivilegedPrompt(), max_new_tokens=64)
    assert len(built.prompts) == 400 and not Counter(built.dropped)
    for example, pair in built.prompts:
        secret = example.privileged  # all of it: some solutions repeat a sentence of the question
        assert secret in tokenizer.decode(pair.teacher) and secret not in tokenizer.decode(pair.student)
        assert pair.student == tokenizer.encode_prompt(example.messages)


def test_a_question_that_ends_with_an_answer_is_refused_with_a_key_that_the_builder_has(tmp_path):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": messages, "messages": messages, "answer": "4"}))
    with pytest.raises(InputError, match=r"ends with an assistant message.*dataset\.completion_key"):
        qa_dataset(str(file), privileged_key=None)
    with pytest.raises(InputError, match=r"ends with an assistant message.*dataset\.completion: after_last_user"):
        chat_dataset(str(file), privileged_key=None)
