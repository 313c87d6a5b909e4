"""Test the teacher's view in a chat template of its own: of another folder, or with other variables."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pidistill.commands.preview.rows import row_of, source_of
from pidistill.data import load_prompts
from pidistill.data.prompts import prompt_overflow
from pidistill.errors import InputError
from pidistill.privileged import PrivilegedPrompt
from pidistill.privileged.hindsight import Hindsight, Transcript, add_hindsight
from pidistill.testing import TINY_SIZES
from pidistill.tokenizers import HFChatTokenizer, WordTokenizer
from pidistill.types import Example, Rollout
from tests.support.chat_templates import QWEN3
from tests.support.siblings import ONE
from tests.support.tiny_tokenizers import llama_folder, qwen_folder

PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
ROW = Example(id="row 0", messages=[{"role": "user", "content": "2+2?"}], privileged="it is 4")
NO_THOUGHT = "<think>\n\n</think>\n\n"


def config(folder: Path, student: Path, teacher: Path | None = None, privileged: dict | None = None, **tokenizer):
    """A config as the recipes read it, with one row."""
    (folder / "rows.jsonl").write_text(json.dumps({"question": "2+2?", "answer": "4", "pi": "it is 4"}) + "\n")
    component = "pidistill.tokenizers.HFChatTokenizer"
    cfg = {
        "model": {"_component_": "torchtune.models.llama3.llama3", **TINY_SIZES, "vocab_size": 700},
        "tokenizer": {"_component_": component, "path": str(student), **tokenizer},
        "checkpointer": {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(student)},
        "privileged": {"_component_": "pidistill.privileged.PrivilegedPrompt"} | (privileged or {}),
        "dataset": {
            "_component_": "pidistill.data.qa_dataset",
            "source": str(folder / "rows.jsonl"),
            "privileged_key": "pi",
        },
    }
    if teacher is not None:
        cfg["teacher_tokenizer"] = {"_component_": component, "path": str(teacher)}
    return OmegaConf.create(cfg)


@pytest.fixture
def folders(tmp_path):
    return qwen_folder(tmp_path / "student", QWEN3), qwen_folder(tmp_path / "teacher", PLAIN)


def texts(data) -> tuple[str, str]:
    ((_, pair),) = data.prompts
    return data.tokenizer.decode(pair.student), data.tokenizer.decode(pair.teacher)


def test_the_teachers_prompt_is_in_the_teachers_template_with_and_without_privileged_information(tmp_path, folders):
    student, teacher = texts(load_prompts(config(tmp_path, *folders), no_pi="distill"))
    assert student == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert teacher.startswith("system: <privileged_information>\nit is 4\n") and teacher.endswith("user: 2+2?\n\nassistant:")
    none = load_prompts(config(tmp_path, *folders, privileged={"control": "none"}), no_pi="distill")
    assert texts(none) == (student, "user: 2+2?\n\nassistant:") and not none.prompts[0][1].has_privileged


def test_variables_of_the_template_can_differ_between_the_views(tmp_path, folders):
    cfg = config(
        tmp_path,
        folders[0],
        privileged={"teacher_template_kwargs": {"enable_thinking": True}},
        template_kwargs={"enable_thinking": False},
    )
    student, teacher = texts(load_prompts(cfg, no_pi="distill"))
    assert student.endswith(f"assistant\n{NO_THOUGHT}") and teacher.endswith("assistant\n") and "it is 4" in teacher
    source = source_of(cfg)  # what `pidistill preview` shows
    row = row_of(source.examples[0], source)
    assert source.tokenizer.decode(row.views.pair.teacher) == teacher
    assert source.tokenizer.decode(row.views.pair.student) == student
    ((start, end),) = row.privileged_spans
    assert teacher[start:end] == source.privileged.block(source.examples[0])


def test_the_privileged_tokens_are_counted_within_the_teachers_template(folders):
    student, teacher = (HFChatTokenizer(str(folder)) for folder in folders)
    own = PrivilegedPrompt(teacher_tokenizer=teacher).build(ROW, student)
    assert own.privileged_tokens == PrivilegedPrompt().build(ROW, teacher).privileged_tokens > 0
    assert own.pair.student == PrivilegedPrompt().build(ROW, student).pair.student
    room = len(own.pair.teacher) + 10
    assert prompt_overflow(ROW, own, 10, room) is None and prompt_overflow(ROW, own, 11, room) is not None


def test_hindsight_writes_the_teachers_prompt_in_the_teachers_template(folders):
    student, teacher = (HFChatTokenizer(str(folder)) for folder in folders)
    privileged, rollouts = PrivilegedPrompt(teacher_tokenizer=teacher), []
    for reward in (0.0, 1.0):
        turn = {"role": "assistant", "content": "four"}
        ids = student.encode_turn(ROW.messages, turn)
        pair = privileged.build(ROW, student).pair
        rollouts.append(Rollout(ROW, pair, ids, [True] * len(ids), None, "student", 0, "done", [turn], reward))
    add_hindsight(Hindsight(Transcript()), rollouts, privileged, student, ONE, max_seq_len=600)
    said = student.decode(rollouts[0].prompts.teacher)
    assert "assistant: four" in said and said.endswith("user: 2+2?\n\nassistant:")


def test_a_teacher_tokenizer_with_other_ids_and_variables_without_a_template_are_refused(tmp_path, folders):
    other = llama_folder(tmp_path / "llama")
    with pytest.raises(InputError, match="teacher_tokenizer is another tokenizer than the student's"):
        load_prompts(config(tmp_path, folders[0], other), no_pi="distill")
    words = WordTokenizer(["p", "b", "e", "2+2?"], pad="p", bos="b", end="e")
    with pytest.raises(InputError, match="teacher_template_kwargs is set, and WordTokenizer has no chat template"):
        PrivilegedPrompt(teacher_template_kwargs={"a": 1}).build(ROW, words)


def test_other_variables_change_nothing_of_the_tokenizer_itself(tmp_path):
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, QWEN3)), template_kwargs={"enable_thinking": False})
    before = tokenizer.encode_prompt(ROW.messages)
    other = tokenizer.with_template_kwargs({"enable_thinking": True})
    assert other is tokenizer.with_template_kwargs({"enable_thinking": True})
    assert other.encode_prompt(ROW.messages) != before == tokenizer.encode_prompt(ROW.messages)
    assert other.stop_ids == tokenizer.stop_ids
