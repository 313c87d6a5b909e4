"""Test `pidistill preview`: it marks what the teacher alone sees, its ids are those of the run, and it reports mistakes."""

import json
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torchtune import _recipe_registry as recipe_registry

from pidistill.chat.messages import message_text
from pidistill.commands import main as _cli
from pidistill.commands import places
from pidistill.commands.places import load_config
from pidistill.commands.preview.command import main
from pidistill.commands.preview.marks import difference
from pidistill.commands.preview.show import marked
from pidistill.config import build
from pidistill.data import ExampleDataset, demonstration, load_prompts, qa_dataset
from pidistill.privileged.prompt import PLACEMENTS
from pidistill.tokenizers import HFChatTokenizer
from tests.support.chat_templates import ALTERNATING, QWEN25
from tests.support.configs import CONFIGS, name_of
from tests.support.tiny_tokenizers import llama_folder, qwen_folder, r1_folder

FOLDERS = {"qwen": qwen_folder, "llama": llama_folder, "r1": r1_folder}
SECRET = "The secret:\nuser system 72 <|im_end|> assistant {braces}"  # words of the template, a control token, braces
ROWS = [
    {"question": "What is 6 * 12?", "privileged": SECRET, "answer": "Six times twelve is 72."},
    {"question": "Ünïcödé 漢字?", "privileged": "user", "answer": "system"},
    {"question": "And without?", "privileged": None, "answer": "Nothing."},
]


def run(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


def previewed(capsys, *words: str) -> dict:
    return json.loads(run(capsys, *words, "--json")[1])


def config_of(
    folder: Path, rows: list[dict], family: str = "qwen", template: str | None = None, block: str | None = None, **privileged
) -> str:
    """A file that opsd_distributed would run: a tiny model, a tokenizer with a real chat template, these rows."""
    make = FOLDERS[family]
    make(folder / "model") if template is None else make(folder / "model", template)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"source": str(folder / "rows.jsonl"), "privileged_key": "privileged"}
    qa = {"_component_": "pidistill.data.qa_dataset", "answer_key": None, "completion_key": "answer"} | source
    chat = {"_component_": "pidistill.data.chat_dataset"} | source
    cfg = OmegaConf.load(Path(places.folders()[1]) / "tiny" / "opsd.yaml")
    cfg.model.vocab_size, cfg.model.max_seq_len = 800, 600
    cfg.tokenizer = {"_component_": "pidistill.tokenizers.HFChatTokenizer", "path": str(folder / "model"), "max_seq_len": 600}
    cfg.dataset = chat if "messages" in rows[0] else qa
    cfg.privileged = {"_component_": "pidistill.privileged.PrivilegedPrompt"} | privileged
    if block:
        cfg.privileged.template = block
    del cfg.eval_dataset
    OmegaConf.save(cfg, folder / "config.yaml")
    return str(folder / "config.yaml")


# ------------------------------------------------------------------------------------------- what is marked


@pytest.mark.parametrize("family", FOLDERS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_is_marked_is_the_privileged_block_and_nothing_else(capsys, tmp_path, family, placement):
    path = config_of(tmp_path, ROWS, family, placement=placement)
    privileged, decode = build(OmegaConf.load(path).privileged), HFChatTokenizer(str(tmp_path / "model")).decode
    rows = previewed(capsys, path, "--rows", "3")["rows"]
    assert len(rows) == 3
    for row, given in zip(rows, ROWS, strict=True):
        text, spans = row["teacher"]["text"], row["teacher"]["privileged_spans"]
        block = privileged.template.format(privileged=given["privileged"])
        assert [text[a:b] for a, b in spans] == ([block] if given["privileged"] else [])
        assert decode(row["student"]["ids"]) == row["student"]["text"] and decode(row["teacher"]["ids"]) == text


def test_a_short_block_that_the_template_says_too_is_marked_in_its_own_place(capsys, tmp_path):
    path = config_of(tmp_path, ROWS[1:2], placement="user_end", block="{privileged}")
    (row,) = previewed(capsys, path)["rows"]
    (a, b), text = row["teacher"]["privileged_spans"][0], row["teacher"]["text"]
    assert text.count("user") > 1 and text[a:b] == "user"
    assert text[:a].endswith("漢字?\n\n") and text[b:].startswith("<|im_end|>")


def test_privileged_messages_are_marked_one_by_one(capsys, tmp_path):
    told = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "72 it is"}]
    rows = [{"messages": [{"role": "user", "content": "user: 6 * 12?"}], "privileged": told}]
    (row,) = previewed(capsys, config_of(tmp_path, rows, placement="before_user"))["rows"]
    text, spans = row["teacher"]["text"], row["teacher"]["privileged_spans"]
    assert [text[a:b] for a, b in spans] == [message_text(message) for message in told]
    assert text[: spans[0][0]].endswith("<|im_start|>user\n") and text[: spans[1][0]].endswith("<|im_start|>assistant\n")


def test_ids_are_those_that_the_recipe_trains_on(capsys, tmp_path):
    path = config_of(tmp_path, ROWS)
    ours = previewed(capsys, path, "--rows", "3")["rows"]
    cfg = OmegaConf.load(path)
    data = load_prompts(cfg, no_pi="rl")
    for row, (example, pair) in zip(ours, data.prompts, strict=True):
        assert (row["id"], row["student"]["ids"], row["teacher"]["ids"]) == (example.id, pair.student, pair.teacher)
        given = demonstration(example, pair, data.tokenizer)
        assert row["completion"]["ids"] == given.completion and row["completion"]["policy_mask"] == given.policy_mask


def test_controls_are_shown_as_a_run_has_them(capsys, tmp_path):
    rows = [row | {"privileged": f"the answer of row {i}"} for i, row in enumerate(ROWS)]
    path = config_of(tmp_path, rows)
    shuffled = previewed(capsys, path, "privileged.control=shuffled", "--rows", "3", "--scan", "1")["rows"]
    prompts = load_prompts(OmegaConf.merge(OmegaConf.load(path), {"privileged": {"control": "shuffled"}}), no_pi="rl").prompts
    assert [row["teacher"]["ids"] for row in shuffled] == [pair.teacher for _, pair in prompts]
    none = previewed(capsys, path, "privileged.control=none", "--rows", "3")
    assert none["rows_without_pi"] == 3 and all(
        row["student"] == {k: row["teacher"][k] for k in ("ids", "text")} for row in none["rows"]
    )


@pytest.mark.parametrize(
    ("student", "teacher", "places"),
    [
        ([1, 2, 3], [1, 9, 9, 2, 3], ((1, 1), (1, 3))),
        ([1, 2, 3], [1, 2, 3], ((3, 3), (3, 3))),
        ([1, 2, 3], [1, 7, 3], ((1, 2), (1, 2))),
        ([1, 2, 1, 2], [1, 2, 1, 2, 1, 2], ((4, 4), (4, 6))),  # what is common to both ends is counted once
        ([], [5], ((0, 0), (0, 1))),
    ],
)
def test_the_difference_of_two_views_lies_between_their_common_ends(student, teacher, places):
    found = difference(student, teacher)
    assert (found.student, found.teacher) == places
    (a, b), (c, d) = places
    assert student[:a] == teacher[:c] and student[b:] == teacher[d:]


# ------------------------------------------------------------------------------------------- what is printed


def test_marks_are_the_only_thing_that_is_added_to_a_text():
    text, spans = "ab [red]cd[/red] ef", [(3, 8), (10, 12)]
    assert marked(text, spans, ("⟦", "⟧"), "red", colour=False).plain == "ab ⟦[red]⟧cd⟦[/⟧red] ef"
    in_colour = marked(text, spans, ("⟦", "⟧"), "red", colour=True)
    assert in_colour.plain == text and [(s.start, s.end) for s in in_colour.spans if s.style] == spans


def test_without_a_terminal_prompts_are_printed_as_decoded_with_marks(capsys, tmp_path):
    path = config_of(tmp_path, ROWS)
    status, out, _ = run(capsys, path)
    (row, _) = previewed(capsys, path)["rows"]
    (a, b), text = row["teacher"]["privileged_spans"][0], row["teacher"]["text"]
    assert status == 0
    assert row["student"]["text"] in out and f"{text[:a]}⟦{text[a:b]}⟧{text[b:]}" in out
    assert f"⟨{row['completion']['text']}⟩" in out and "<|im_end|>" in row["completion"]["text"]
    assert f"student prompt {len(row['student']['ids'])} tokens, teacher prompt {len(row['teacher']['ids'])}" in out
    assert "message 0 (system) is longer" in out and "rows without privileged information: 1" in out


def test_observations_are_not_marked_as_the_policys(capsys):
    row = previewed(capsys, "tiny/sft", "--rows", "1", "--scan", "5")["rows"][0]["completion"]
    said = [row["text"][a:b].split() for a, b in row["policy_spans"]]
    assert sum(map(len, said)) == sum(row["policy_mask"]) < len(row["policy_mask"])
    assert all(words[-1] == "end" and "obs" not in words for words in said) and len(said) > 1


# ------------------------------------------------------------------------------------------- lengths and budget


def test_lengths_are_those_of_all_scanned_rows(capsys, tmp_path):
    path = config_of(tmp_path, ROWS)
    pairs = [pair for _, pair in load_prompts(OmegaConf.load(path), no_pi="rl").prompts]
    lengths = previewed(capsys, path, "--rows", "0")["lengths"]
    student = sorted(len(pair.student) for pair in pairs)
    assert lengths["student prompt"] == {
        "rows": 3,
        "min": student[0],
        "mean": pytest.approx(sum(student) / 3),
        "p95": student[-1],
        "max": student[-1],
    }
    added = sorted(len(pair.teacher) - len(pair.student) for pair in pairs if pair.has_privileged)
    assert (lengths["privileged"]["rows"], lengths["privileged"]["min"], lengths["privileged"]["max"]) == (2, *added)
    assert previewed(capsys, path, "--scan", "2", "--rows", "0")["lengths"]["student prompt"]["rows"] == 2


def test_rows_that_do_not_fit_are_dropped_or_refused_as_in_a_run(capsys, tmp_path):
    path = config_of(tmp_path, ROWS)
    longest = previewed(capsys, path)["rows"][0]["privileged_tokens"]
    limit = f"privileged.max_privileged_length={longest - 1}"
    result = previewed(capsys, path, limit, "privileged.on_overflow=drop")
    assert result["dropped"] == {"privileged_too_long": 1} and result["refused"] is None
    assert [row["dropped"] for row in result["rows"]] == ["privileged_too_long", None]
    status, out, err = run(capsys, path, limit)
    assert status == 2 and SECRET.splitlines()[0] in out
    assert err.startswith("error: rows.jsonl row 0: privileged information of") and err.count("\n") == 1
    code, out, error = run(capsys, path, "tokenizer.max_seq_len=60", "on_overflow=drop", "--json")
    assert json.loads(out)["dropped"]["prompt_too_long"] == 3
    assert code == 2 and "none of the 3 rows of dataset looked at is left (prompt_too_long 3); check the dataset" in error


def test_a_row_of_the_evaluation_that_a_run_would_refuse_is_refused_after_the_preview(capsys, tmp_path):
    name = config_of(tmp_path, ROWS)
    (tmp_path / "held_out.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[0] | {"question": "long " * 600}))
    cfg = OmegaConf.load(name)
    cfg.eval_dataset = cfg.dataset | {"source": str(tmp_path / "held_out.jsonl")}
    OmegaConf.save(cfg, name)
    code, out, err = run(capsys, name)
    assert code == 2 and "What is 6 * 12?" in out
    assert err.startswith("error: eval_dataset: ") and "held_out.jsonl row 1" in err
    assert run(capsys, name, "--scan", "1")[0] == 0, "the second row is not looked at"
    assert previewed(capsys, name)["refused"].startswith("eval_dataset: ")


def test_the_budget_is_the_rounds(capsys):
    budget = previewed(capsys, "tiny/opsd", "--scan", "50", "--rows", "0", "updates_per_round=2", "minibatch_rollouts=64")[
        "budget"
    ]
    assert budget["rollouts of a round"] == 16 * 8 and budget["rollouts of a step"] == 64
    assert budget["policy tokens of a step, at most"] == 64 * 50
    assert budget["rounds of an epoch"] == 512 / 16 and budget["epochs of the run"] == 80 / 2 * 16 / 512
    supervised = previewed(capsys, "tiny/sft", "--scan", "50", "--rows", "0")
    mean = supervised["lengths"]["its policy tokens"]["mean"]
    assert supervised["budget"]["policy tokens of a step"] == round(64 * mean)


def half_of_the_rows(**options) -> ExampleDataset:
    rows = list(qa_dataset(**options))
    return ExampleDataset(rows[::2], {"odd": len(rows) // 2})


def test_rows_that_a_dataset_leaves_out_itself_are_no_share_of_those_that_are_kept(capsys, tmp_path):
    path = config_of(tmp_path, ROWS * 4)
    half = f"dataset._component_={__name__}.half_of_the_rows"
    shown = previewed(capsys, path, half, "--rows", "0", "prompts_per_round=2")
    assert (shown["total"], shown["dropped"]) == (6, {"odd": 6}) and shown["budget"]["rounds of an epoch"] == 3


@pytest.mark.parametrize(
    "views, per_row", [(None, 7), (["student greedy"], 1), (["student + PI", "student + PI greedy", "student greedy"], 5)]
)
def test_the_budget_of_an_evaluation_counts_the_chosen_views(capsys, views, per_row):
    chosen = [f"views={json.dumps(views)}"] if views else []
    shown = previewed(capsys, "tiny/evaluate", "--scan", "10", "--rows", "0", "eval_samples=3", "dataset.max_rows=10", *chosen)
    assert shown["budget"]["prompts"] == 10 and shown["budget"]["rollouts"] == 10 * per_row


# ------------------------------------------------------------------------------------------- what is not meant


def test_clean_rows_give_no_warning(capsys, tmp_path):
    rows = [{"question": "6 * 12?", "privileged": "It is 72.", "answer": "72"}]
    assert previewed(capsys, config_of(tmp_path, rows))["warnings"] == []


def test_a_template_that_puts_privileged_information_into_the_students_prompt_is_reported(capsys, tmp_path):
    """The template writes a field of the message that a row keeps its hint in."""
    said = "'\\n' + message.content + '<|im_end|>'"
    leaking = QWEN25.replace(said, said.replace("message.content", "(message.hint or '') + message.content"))
    assert leaking != QWEN25
    rows = [
        {"messages": [{"role": "user", "content": " 6 * 12?", "hint": hint}], "privileged": "think of\n  six dozen"}
        for hint in ("think of six dozen", "other words", "think of six dozens")
    ]
    (warning,) = previewed(capsys, config_of(tmp_path, rows, template=leaking))["warnings"]
    assert warning.startswith("1 of 3 rows: the student's prompt holds the privileged information")
    assert "rows.jsonl row 0" in warning
    assert previewed(capsys, config_of(tmp_path, rows))["warnings"] == []


def test_leak_phrases_in_the_privileged_information_and_in_questions_are_reported(capsys, tmp_path):
    rows = [
        {"question": "6 * 12?", "privileged": "The Reference Solution says 72.", "answer": "72"},
        {"question": "What does the hint say?", "privileged": "nothing of hints", "answer": "72"},
    ]
    warnings = previewed(capsys, config_of(tmp_path, rows))["warnings"]
    assert len(warnings) == 2
    assert "itself says the leak phrase 'reference solution'" in warnings[0] and "row 0" in warnings[0]
    assert "the student's prompt says the leak phrase 'the hint'" in warnings[1] and "row 1" in warnings[1]


def test_a_placement_that_the_template_refuses_is_said_with_those_that_it_takes(capsys, tmp_path):
    status, out, err = run(capsys, config_of(tmp_path, ROWS, template=ALTERNATING, placement="system_end"))
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and out == ""
    assert "does not take privileged.placement: system_end" in said and said.endswith("set privileged.placement=user_end")


# ------------------------------------------------------------------------------------------- configs, and what is wrong

TINY = [name_of(path) for path in CONFIGS if path.parent.name == "tiny"]
WITH_ROWS = [name for name in TINY if "made_by" not in load_config(name).dataset]


@pytest.mark.parametrize("name", WITH_ROWS)
def test_every_tiny_config_can_be_previewed(capsys, name):
    fewer = ["dataset.n=20"] if "n" in load_config(name).dataset else []
    status, out, err = run(capsys, name, "--rows", "1", "--scan", "20", *fewer)
    assert status == 0 and err == "", err
    assert "student prompt" in out and "Budget" in out and "warning" not in out


def test_there_are_configs_of_every_kind():
    assert {"tiny/opsd", "tiny/pi_distill", "tiny/sft", "tiny/evaluate", "tiny/rft_sample"} <= set(WITH_ROWS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tiny/opsd", "micro_batch_token=5"), "did you mean micro_batch_tokens?"),
        (("tiny/nothing",), "config tiny/nothing is neither a file nor a bundled config"),
        (("tiny/opsd", "--scan", "0"), "--scan 0"),
        (("tiny/opsd", "--scan=abc"), "--scan: abc is not a number of rows"),
        (("tiny/opsd", "group_size=1=2"), "key=value"),
        (("tiny/opsd", "privileged.placement=end"), "privileged.placement=end is unknown"),
        (("tiny/opsd", "model.vocab_size=8"), "the model's vocabulary has 8"),
        (("tiny/opsd", "dataset.split=${nothing}"), "nothing"),
        (("tiny/rft",), "is written by the stage before"),
        (("qwen2_5/0.5B_opsd",), "tokenizer.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(capsys, monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *words)
    assert status == 2 and said in err and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


def test_the_command_is_reached_from_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(recipe_registry, "_ALL_RECIPES", [])
    monkeypatch.setattr(sys, "argv", ["pidistill", "preview", "tiny/pi_distill", "--rows", "1", "--scan", "3"])
    with pytest.raises(SystemExit) as ended:
        _cli.main()
    assert ended.value.code == 0 and "⟦" in capsys.readouterr().out
