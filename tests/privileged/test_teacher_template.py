"""Test the teacher's view in a chat template of its own: of another folder, or with other variables."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pidistill.commands.preview.rows import row_of, source_of
from pidistill.data import load_prompts
from pidistill.data.prompts import prompt_overflow
from pidistill.envs.base import EnvStep
from pidistill.errors import InputError
from pidistill.privileged import PrivilegedPrompt
from pidistill.privileged.hindsight import Hindsight, Transcript, add_hindsight
from pidistill.privileged.turn_templates import check_turn_templates
from pidistill.rollouts import Sample, collect_rollouts
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
SINGLE = {"_component_": "pidistill.envs.SingleTurn", "reward": None}
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


# ------------------------------------------------------------------------------------------- environments that answer


class Asking:
    """An environment that asks once more, and gives the teacher a text with its question."""

    gives_privileged = True

    def reset(self, example):
        return [0]

    def step(self, state, turn, *, truncated):
        state[0] += 1
        done = state[0] == 2
        return EnvStep([] if done else [{"role": "user", "content": "more"}], 1.0, done, privileged=None if done else "say 7")


def play(tokenizer, privileged, **limits):
    pair = privileged.encode(ROW, tokenizer)
    arguments = {"view": "student", "group_size": 1, "seeds": [0], "privileged": privileged} | limits
    turns = SaidIds(tokenizer.encode_turn(ROW.messages, {"role": "assistant", "content": "ok"}))
    return collect_rollouts(None, turns, tokenizer, Asking(), [ROW], [pair], **arguments)


class SaidIds:
    """A sampler that says the same ids in every turn."""

    temperature, top_p, top_k, max_new_tokens = 1.0, None, None, 500

    def __init__(self, ids):
        self.ids = ids

    def sample(self, model, prompts, *, on_turn_end, **kwargs):
        sample = Sample([], [], [], "done")
        forced: list[int] | None = []
        while forced is not None:
            own = [*[False] * len(forced), *[True] * len(self.ids)]
            sample.tokens += [*forced, *self.ids]
            sample.policy_mask += own
            sample.logprobs += [-1.0 if policy else float("nan") for policy in own]
            forced = on_turn_end(0, self.ids)
        return [sample]


def test_a_teachers_template_that_writes_an_environments_answer_in_another_way_is_refused(tmp_path, folders):
    tokenizer = HFChatTokenizer(str(folders[0]), template_kwargs={"enable_thinking": False})
    other = PrivilegedPrompt(teacher_template_kwargs={"enable_thinking": True})
    for view in ("student", "teacher"):
        with pytest.raises(InputError, match=r"row 0: the teacher's own chat template \(privileged\.teacher_template_kwargs\)"):
            play(tokenizer, other, view=view)
    assert len(play(tokenizer, other, max_turns=1).rollouts) == 1
    plain = HFChatTokenizer(str(folders[1]))  # its template writes no stop token
    with pytest.raises(InputError, match=r"\(teacher_tokenizer\) takes no answer of .*; remove teacher_tokenizer,"):
        check_turn_templates(PrivilegedPrompt(teacher_tokenizer=plain), tokenizer, ROW)


@pytest.mark.parametrize("view", ["student", "teacher"])
def test_a_teachers_template_that_writes_answers_alike_changes_nothing(view, folders):
    tokenizer = HFChatTokenizer(str(folders[0]), template_kwargs={"enable_thinking": False})
    same = PrivilegedPrompt(teacher_template_kwargs={"unused": 1})
    (own,), (plain,) = (play(tokenizer, privileged, view=view).rollouts for privileged in (same, PrivilegedPrompt()))
    assert own.sequence("teacher") == plain.sequence("teacher") and own.sequence("student") == plain.sequence("student")
    assert own.teacher_reads and own.policy_mask == plain.policy_mask


def test_such_a_template_is_refused_before_weights_are_loaded_where_the_config_has_several_turns(tmp_path, folders):
    cfg = config(
        tmp_path,
        folders[0],
        privileged={"teacher_template_kwargs": {"enable_thinking": True}},
        template_kwargs={"enable_thinking": False},
    )
    asking = {"_component_": f"{__name__}.Asking"}
    for environment, max_turns, refused in ((asking, None, True), (asking, 1, False), (SINGLE, 4, True), (SINGLE, None, False)):
        cfg.environment, cfg.max_turns = environment, max_turns
        with pytest.raises(InputError, match="set max_turns=1") if refused else nullcontext():
            load_prompts(cfg, no_pi="distill")
