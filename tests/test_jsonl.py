"""Test files of one JSON object per line: what is written is read again, and half a line is left out."""

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
