"""Test that `python -m pidistill.commands.trace_report` says in one sentence what is wrong with its words."""

import json

import pytest

from pidistill.commands.trace_report import main


@pytest.mark.parametrize(
    "words, said",
    [
        (["messages"], "'messages' must be written as argument=value"),
        (["messages_keys=traj"], "argument messages_keys is not read here; did you mean messages_key?"),
        (["kind=calls"], "argument kind is not read here; the nearest ones are: "),
        (["source=other.jsonl"], "argument source is not read here"),
        (["messages_key=["], "messages_key=[ is not valid YAML (while parsing a flow node"),
        (["max_tasks=many"], "max_tasks=many must be a whole number or null"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(words, said, tmp_path, capsys):
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "done"}]
    (tmp_path / "traces.jsonl").write_text(json.dumps({"task_id": 1, "reward": 1.0, "messages": turns}) + "\n")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "traces.jsonl"), *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {said}") and error.count("\n") == 1
