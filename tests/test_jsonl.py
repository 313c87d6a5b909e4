"""Test files of one JSON object per line: what is written is read again, and half a line is left out."""

import pytest

from pidistill.jsonl import read_jsonl, write_jsonl


def test_rows_are_appended_and_read_again_with_line_separators_inside_their_texts(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_jsonl(path) == []
    rows = [{"text": "one\u2028two\nthree"}, {"text": "half a pair: \ud83d"}, {"number": 1.5}]
    write_jsonl(path, rows[:1])
    write_jsonl(path, rows[1:])
    assert read_jsonl(path) == rows


def test_a_last_line_that_a_kill_cut_off_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"step": 1}])
    with path.open("a") as file:
        file.write('{"step": 2, "loss"')
    assert read_jsonl(path) == [{"step": 1}]


@pytest.mark.parametrize("half", ['{"step": 2, "loss"', '{"text": "漢字'], ids=["between characters", "inside a character"])
def test_a_row_after_a_line_that_was_cut_off_stands_alone_and_a_warning_names_the_cut_one(half, tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"step": 1}])
    with path.open("ab") as file:
        file.write(half.encode()[:-1])
    write_jsonl(path, [{"step": 3}])
    write_jsonl(path, [{"step": 4}])
    assert [row["step"] for row in read_jsonl(path) + read_jsonl(path)] == [1, 3, 4, 1, 3, 4]
    (said,) = caplog.messages
    assert "rows.jsonl: the line that begins with" in said and half[:6] in said and "is left out" in said
