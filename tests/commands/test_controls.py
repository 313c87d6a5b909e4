"""Test that control characters of data, of the model and of logs reach neither a terminal nor a report."""

import json

import pytest
from rich.console import Console

from pidistill.commands.common import exit_on_input_error
from pidistill.commands.preview.show import marked, show_findings
from pidistill.commands.sweep.execute import last_error, print_line
from pidistill.commands.sweep.groups import groups_of
from pidistill.commands.sweep.results import failures
from pidistill.commands.trace_report import main as trace_report
from pidistill.errors import InputError

RED = "\x1b[31m"


def test_a_preview_shows_them_escaped_and_marks_the_right_place(capsys):
    text = marked(f"a{RED}bc", [(6, 7)], ("⟦", "⟧"), "bold", colour=False)
    assert text.plain == "a\\x1b[31m⟦b⟧c"
    show_findings(Console(), [f"row {RED}"])
    assert RED not in capsys.readouterr().out


def test_a_sweep_shows_them_escaped(capsys):
    print_line(f"FAILED {RED}")
    row = {"arm": "a", "title": f"a{RED}", "settings": {}, "status": "failed", "cell": "c", "error": f"{RED}wrong"}
    assert RED not in capsys.readouterr().out + failures([row])[0] + groups_of([row])[0].title


def test_a_sweep_finds_the_sentence_behind_a_progress_bar(tmp_path):
    (tmp_path / "log.txt").write_text("steps:  10%|█ | 1/10\rsteps:  20%|██ | 2/10\rerror: the data ended\n")
    assert last_error(tmp_path / "log.txt") == "error: the data ended"


def test_a_refusal_shows_them_escaped(capsys):
    with pytest.raises(SystemExit), exit_on_input_error():
        raise InputError(f"the word {RED} is unknown,\nsays the tokenizer")
    assert capsys.readouterr().err == "error: the word \\x1b[31m is unknown, says the tokenizer\n"


def test_a_trace_report_shows_them_escaped(tmp_path, capsys):
    turns = [{"role": "user", "content": f"{RED}ask"}, {"role": "assistant", "content": "done"}]
    (tmp_path / "traces.jsonl").write_text(json.dumps({"task_id": 1, "reward": 1.0, "traj": turns}) + "\n")
    trace_report([str(tmp_path / "traces.jsonl"), "messages_key=traj", "--show", "1", "--kind", "full"])
    shown = capsys.readouterr().out
    assert "\\x1b[31mask" in shown and RED not in shown
