"""Test `pidistill prepare gsm8k`: verl's layout, and prompts that equal those of the published rows, id for id."""

import json
import os
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from torchtune import _recipe_registry as recipe_registry

from pidistill.commands import main as _cli
from pidistill.commands.prepare import main
from pidistill.data import demonstration, gsm8k_dataset, qa_dataset
from pidistill.errors import InputError
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.tokenizers import HFChatTokenizer
from tests.support.tiny_tokenizers import llama_folder, qwen_folder

DATA = os.environ.get("PIDISTILL_TEST_DATA")
KEYS = {"question_key": "prompt", "answer_key": "reward_model.ground_truth", "completion_key": "extra_info.demonstration"}
ROWS = [
    {"question": "What is 6 * 12?", "answer": "6*12 = <<6*12=72>>72.\n#### 72"},
    {"question": "And 1000 + {234}?", "answer": "1000+234 = $<<1000+234=1234>>1,234.\n#### 1,234"},
]


@pytest.fixture(params=["made up", "real"])
def source(request, tmp_path):
    """Two rows, or the first 300 of GSM8K."""
    if request.param == "real":
        if not DATA:
            pytest.skip("PIDISTILL_TEST_DATA is not set: no GSM8K rows to prepare")
        return Path(DATA) / "gsm8k_train.jsonl"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def prepared(tmp_path: Path, source: Path, *words: str) -> Path:
    output = tmp_path / "data" / "rows.parquet"
    with pytest.raises(SystemExit) as ended:
        main(["gsm8k", "--source", str(source), "--output", str(output), "--max-rows", "300", *words])
    assert ended.value.code == 0
    return output


@pytest.mark.parametrize("privileged", ["solution", "answer", "none"])
@pytest.mark.parametrize("answer_format", ["boxed", "hashes"])
def test_prompts_are_those_of_the_rows_as_published(tmp_path, source, privileged, answer_format):
    output = prepared(tmp_path, source, "--privileged", privileged, "--answer-format", answer_format)
    key = {"privileged_key": None} if privileged == "none" else {}
    ours = qa_dataset(str(output), **KEYS, **key)
    published = gsm8k_dataset(str(source), privileged=privileged, answer_format=answer_format, max_rows=300)
    make = qwen_folder if answer_format == "boxed" else llama_folder
    tokenizer, prompt = HFChatTokenizer(str(make(tmp_path / "model"))), PrivilegedPrompt()
    assert len(ours) == len(published) >= 2
    for mine, theirs in zip(ours, published, strict=True):
        pairs = [prompt.encode(example, tokenizer) for example in (mine, theirs)]
        assert pairs[0] == pairs[1]
        assert pairs[0].has_privileged == (privileged != "none")
        assert mine.reference == theirs.reference
        completions = [demonstration(e, pair, tokenizer).completion for e, pair in zip((mine, theirs), pairs, strict=True)]
        assert completions[0] == completions[1]


def test_prepared_rows_have_verls_layout(tmp_path, source):
    table = pyarrow.parquet.read_table(prepared(tmp_path, source, "--privileged", "answer", "--split", "test")).to_pylist()
    published = [json.loads(line) for line in source.read_text().splitlines()][:300]
    assert len(table) == len(published)
    for index, (row, given) in enumerate(zip(table, published, strict=True)):
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        (message,) = row["prompt"]
        assert message["role"] == "user" and message["content"].startswith(given["question"])
        answer = given["answer"].rpartition("#### ")[2].replace(",", "")
        assert row["reward_model"] == {"style": "rule", "ground_truth": answer}
        info = row["extra_info"]
        assert (info["question"], info["answer"], info["index"], info["split"]) == (*given.values(), index, "test")
        assert info["privileged_context"] == f"The final answer is {answer}."
        assert f"\\boxed{{{answer}}}" in info["demonstration"]


def test_a_system_prompt_stands_in_front(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n")
    output = prepared(tmp_path, source, "--system-prompt", "Be brief.")
    (example,) = qa_dataset(str(output), **KEYS)
    assert [message["role"] for message in example.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source", "nothing.jsonl", "--output", "x.parquet"], "nothing.jsonl does not exist"),
        (["--source", "rows.jsonl", "--output", "x.json"], "--output x.json must end in .parquet"),
        (["--source", "rows.jsonl", "--output", "x.parquet"], "rows.jsonl row 0: answer does not end with '#### N'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"question": "6 * 12?", "answer": "72"}) + "\n")
    monkeypatch.setattr(recipe_registry, "_ALL_RECIPES", [])
    monkeypatch.setattr(sys, "argv", ["pidistill", "prepare", "gsm8k", *words])
    with pytest.raises(SystemExit) as ended:
        _cli.main()
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(err) == 1 and said in err[0]
    assert not Path("x.parquet").exists()


def test_a_place_that_cannot_be_written_is_said_in_one_sentence(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "folder.parquet").mkdir()
    for output in ("rows.jsonl/x.parquet", "folder.parquet"):
        with pytest.raises(SystemExit) as ended:
            main(["gsm8k", "--source", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / output)])
        error = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and error.startswith("error: --output ") and error.endswith("; name another file")


def test_a_config_that_reads_the_file_says_how_to_make_it(tmp_path):
    with pytest.raises(InputError, match="written by the stage before: run `pidistill prepare gsm8k` first"):
        qa_dataset(str(tmp_path / "rows.parquet"), **KEYS, made_by="pidistill prepare gsm8k")
