"""Test `pidistill preview --scan`: every row of a dataset is rendered, checked, and counted by kind."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pidistill.commands import places
from pidistill.commands.places import is_supervised
from pidistill.commands.preview.command import main, name_all_rows
from pidistill.data import build_demonstrations, chat_dataset, load_prompts
from pidistill.data.dataset import collect_refused_rows
from pidistill.errors import InputError
from tests.support.chat_templates import QWEN3, QWEN25
from tests.support.tiny_tokenizers import qwen_folder

QUESTION = {"role": "user", "content": "2+2?"}
CALL = {"type": "function", "function": {"name": "book", "arguments": {"seats": 2}}}
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def answered(*turns: dict | str) -> dict:
    said = [{"role": "assistant", "content": turn} if isinstance(turn, str) else turn for turn in turns]
    return {"messages": [QUESTION, *said], "hint": "it is 4"}


def config_of(folder: Path, rows: list, recipe: str = "sft", template: str = QWEN25, **changes) -> str:
    """Write a config over these rows; entries that are texts are lines as they stand."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    qwen_folder(folder / "model", template)
    cfg = OmegaConf.load(Path(places.folders()[1]) / "tiny" / f"{recipe}.yaml")
    cfg.model.vocab_size, cfg.model.max_seq_len = 800, 600
    cfg.tokenizer = {"_component_": "pidistill.tokenizers.HFChatTokenizer", "path": str(folder / "model"), "max_seq_len": 600}
    cfg.dataset = {"_component_": "pidistill.data.chat_dataset", "source": str(folder / "rows.jsonl"), "privileged_key": None}
    cfg.dataset |= {"completion": "after_last_user"} if recipe == "sft" else {"privileged_key": "hint"}
    cfg.pop("eval_dataset", None)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    return str(folder / "config.yaml")


def scanned(capsys, *words: str) -> tuple[int, dict, str]:
    """Return (exit status, the report of each dataset, standard error)."""
    with pytest.raises(SystemExit) as ended:
        main(["--scan", *words, "--json"])
    out = capsys.readouterr()
    return ended.value.code, json.loads(out.out or "{}"), out.err


def kinds(report: dict) -> dict[str, int]:
    return {kind: refusals["rows"] for kind, refusals in report["refused"].items()}


def test_rows_that_a_run_takes_give_status_0(capsys, tmp_path):
    status, reports, err = scanned(capsys, config_of(tmp_path, [answered("4")] * 5))
    report = reports["dataset"]
    assert status == 0 and (report["rows"], report["right"], report["refused"]) == (5, 5, {}) and "error" not in err


def test_refused_rows_are_counted_by_kind_with_the_first_row_of_each(capsys, tmp_path):
    rows = [
        answered("4"),
        {"messages": [QUESTION, {"role": "narrator", "content": "x"}]},
        answered({"role": "assistant", "content": "", "tool_calls": [CALL]}),
        answered({"role": "assistant", "content": "4", "reasoning_content": "Two and two."}),
        answered({"role": "assistant", "content": "4", "weight": 0}),
        answered("4 " * 700),
        {"messages": "no list"},
    ]
    path = config_of(tmp_path, rows, template=PLAIN)
    status, reports, err = scanned(capsys, path)
    report = reports["dataset"]
    assert (report["rows"], report["right"]) == (7, 1) and status == 2
    assert kinds(report) == {
        "not read as a row": 2,
        "text left out by the chat template": 2,
        "nothing to learn": 1,
        "too long": 1,
    }
    assert "rows.jsonl row 1: messages[1] has the unknown role 'narrator'" in report["refused"]["not read as a row"]["first"]
    assert report["refused"]["text left out by the chat template"]["first"].startswith("rows.jsonl row 2: turn 1: the chat")
    assert "error: 6 of 7 rows of dataset are refused; the first: rows.jsonl row 1" in err


def test_rows_of_one_kind_that_are_refused_for_other_reasons_are_shown_too(capsys, tmp_path):
    roles = [{"messages": [QUESTION, {"role": role, "content": "x"}]} for role in ("narrator", "User", "narrator")]
    rows = [answered("4"), *roles, {"messages": [QUESTION, {"role": "assistant", "content": None}]}, {"messages": 3}]
    path = config_of(tmp_path, rows)
    refused = scanned(capsys, path)[1]["dataset"]["refused"]["not read as a row"]
    assert refused["rows"] == 5 and "row 1: messages[1] has the unknown role 'narrator'" in refused["first"]
    assert [sentence.split(": ", 1)[1].split(",")[0] for sentence in refused["others"]] == [
        "messages[1] has no 'content'",
        "messages is a int",
    ]
    with pytest.raises(SystemExit):
        main(["--scan", path])
    assert "also rows.jsonl row 4: messages[1] has no 'content'" in capsys.readouterr().out


def test_each_refused_row_is_one_that_a_run_refuses(capsys, tmp_path):
    path = config_of(
        tmp_path, [answered("4"), answered({"role": "assistant", "content": "", "tool_calls": [CALL]})], "sft", PLAIN
    )
    sentence = scanned(capsys, path)[1]["dataset"]["refused"]["text left out by the chat template"]["first"]

    data = load_prompts(OmegaConf.load(path), no_pi="rl", samples=False)
    with pytest.raises(InputError) as error:
        build_demonstrations(data.prompts, data.tokenizer, max_seq_len=600, on_overflow=None)
    assert str(error.value) == sentence


def test_rows_left_out_and_rows_without_privileged_information_are_counted_and_refuse_nothing(capsys, tmp_path):
    question = {"messages": [QUESTION], "hint": "it is 4"}
    rows = [question, {**question, "hint": None}, {**question, "hint": "4 " * 700}]
    path = config_of(tmp_path, rows, "opsd")
    status, reports, _ = scanned(capsys, path, "on_overflow=drop")
    report = reports["dataset"]
    assert status == 0 and report["dropped"] == {"prompt_too_long": 1}
    assert (report["right"], report["without_privileged"]) == (2, 1)
    status, reports, _ = scanned(capsys, path, "objective.no_pi=drop", "on_overflow=drop")
    assert status == 0 and reports["dataset"]["dropped"] == {"rows_without_pi": 1, "prompt_too_long": 1}
    status, reports, _ = scanned(capsys, path, "objective.no_pi=error")
    assert status == 2 and kinds(reports["dataset"]) == {"without privileged information": 1, "too long": 1}


def test_earlier_turns_that_a_server_shows_in_another_form_are_counted(capsys, tmp_path):
    rows = [answered("4"), answered("4", QUESTION, "4")]
    path = config_of(tmp_path, rows, template=QWEN3, dataset__completion="from_first_assistant")
    status, reports, _ = scanned(capsys, path)
    report = reports["dataset"]
    assert status == 0 and (report["earlier_turns"], report["earlier_turns_first"]) == (1, "rows.jsonl row 1")


def test_references_of_both_datasets_are_checked(capsys, tmp_path):
    (tmp_path / "qa.jsonl").write_text('{"question": "q", "answer": "4"}\n{"question": "q", "answer": "see the book"}\n')
    qa = {"_component_": "pidistill.data.qa_dataset", "source": str(tmp_path / "qa.jsonl"), "privileged_key": None}
    reward = {"_component_": "pidistill.rewards.GSM8KReward"}
    changes = {
        "dataset": qa, "eval_dataset": qa, "environment": {"_component_": "pidistill.envs.SingleTurn", "reward": reward},
    }  # fmt: skip
    path = config_of(tmp_path, [answered("4")], "rl", **changes)
    status, reports, err = scanned(capsys, path)
    assert status == 2 and "qa.jsonl row 1: the reference 'see the book' is not a number" in err
    assert [kinds(report) for report in reports.values()] == [{"reference that the reward cannot judge": 1}] * 2


def test_a_file_that_cannot_be_read_is_one_sentence(capsys, tmp_path):
    status, _, err = scanned(capsys, config_of(tmp_path, [answered("4"), '{"messages": ']))
    assert status == 2 and "line 2 is not valid JSON" in err and err.count("\n") == 1


def test_the_table_names_kinds_and_rows(capsys, tmp_path):
    path = config_of(
        tmp_path, [answered("4"), answered({"role": "assistant", "content": "", "tool_calls": [CALL]})], "sft", PLAIN
    )
    with pytest.raises(SystemExit) as ended:
        main(["--scan", path])
    out = capsys.readouterr().out
    assert ended.value.code == 2 and "All 2 rows of dataset" in out and "REFUSED: text left out" in out and "row 1" in out


def test_control_characters_of_the_data_are_shown_escaped(capsys, tmp_path):
    path = config_of(tmp_path, [answered("4"), {"messages": [QUESTION, {"role": "\x1b[31mred", "content": "x"}]}])
    with pytest.raises(SystemExit):
        main(["--scan", path])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "x1b[31mred" in out


def test_scan_takes_a_number_or_every_row():
    assert name_all_rows(["--scan", "tiny/opsd"]) == ["--scan", "all", "tiny/opsd"]
    assert name_all_rows(["tiny/opsd", "--scan"]) == ["tiny/opsd", "--scan", "all"]
    assert name_all_rows(["tiny/opsd", "--scan", "--json"]) == ["tiny/opsd", "--scan", "all", "--json"]
    assert name_all_rows(["tiny/opsd", "--scan", "50"]) == ["tiny/opsd", "--scan", "50"]


def test_rows_are_left_out_only_within_the_block_that_collects_them(tmp_path):

    config_of(tmp_path, [answered("4"), {"messages": "no list"}])
    options = {"privileged_key": None, "completion": "after_last_user"}
    with collect_refused_rows() as refused:
        assert len(chat_dataset(str(tmp_path / "rows.jsonl"), **options)) == 1
    assert len(refused) == 1
    with pytest.raises(InputError, match="row 1"):
        chat_dataset(str(tmp_path / "rows.jsonl"), **options)


def test_the_first_line_of_a_config_says_whether_it_is_supervised(tmp_path):
    head = "# tune run --nproc_per_node 1 recipes/{}.py --config x\n"
    named = {"sft_distributed": True, "opsd_distributed": False}
    for recipe, expected in named.items():
        (tmp_path / "a.yaml").write_text(head.format(recipe) + f"batch_size: {2 if not expected else 'null'}\n")
        assert is_supervised(str(tmp_path / "a.yaml"), OmegaConf.create({"batch_size": 2})) is expected
    (tmp_path / "a.yaml").write_text("batch_size: 2\n")
    assert is_supervised(str(tmp_path / "a.yaml"), OmegaConf.create({"batch_size": 2}))
    assert not is_supervised(str(tmp_path / "a.yaml"), OmegaConf.create({"objective": {}}))


@pytest.mark.parametrize(
    ("answers", "kind", "said"),
    [
        (["4", "4"], None, ""),
        (["4", None], "nothing to learn", "no assistant turn"),
        (["4", "4 " * 700], "too long", "leave the row"),
    ],
)
def test_rows_whose_own_completions_stand_in_place_of_samples_need_one_that_fits(capsys, tmp_path, answers, kind, said):
    """Each row has one where GKD samples nothing, so that `on_overflow` leaves none of them out."""
    rows = [{"messages": [QUESTION], "hint": "it is 4", "answer": answer} for answer in answers]
    changes = {"dataset__completion_key": "answer", "objective__lmbda": 0.0, "group_size": 1, "on_overflow": "drop"}
    status, reports, err = scanned(capsys, config_of(tmp_path, rows, "gkd", **changes))
    assert kinds(reports["dataset"]) == ({kind: 1} if kind else {})
    assert status == (2 if kind else 0) and said in err and "on_overflow" not in err
