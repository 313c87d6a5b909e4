"""Rows in the formats that people have, made here with `datasets`, through one training step of a real recipe."""

import math
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from pidistill.errors import InputError
from pidistill.training import cleanup
from tests.recipes.tiny_qwen import load_config, qwen_checkpoint, read_metrics, set_up, small_model

QUESTIONS = [f"Ann has {n} apples and buys {m}. How many has she?" for n, m in ((3, 4), (12, 5), (7, 7), (40, 2))]
ANSWERS = ["7", "17", "14", "42"]
SOLUTIONS = [f"zyxquartz: she has {answer} apples." for answer in ANSWERS]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return qwen_checkpoint(tmp_path_factory.mktemp("qwen"), [*QUESTIONS, *SOLUTIONS])


@pytest.fixture(autouse=True)
def process_group():
    yield
    cleanup()


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def one_step(recipe, config, qwen, output_dir, dataset, *overrides):
    """The recipe after one step on ``dataset``, and the step's metrics; `dataset` replaces the config's, as an edit would."""
    overrides = [*small_model(qwen, output_dir), "max_steps=1", "sampler.max_new_tokens=8", "eval_dataset=null", *overrides]
    cfg = load_config(f"qwen2_5/{config}", overrides)
    cfg.dataset = dataset
    made = set_up(recipe, cfg)
    made.train()
    (row,) = read_metrics(output_dir)
    assert all(math.isfinite(value) for value in row.values()) and row["grad_norm"] > 0 and row["policy_tokens"] > 0
    assert (output_dir / "latest" / "model.safetensors").is_file()
    return made, row


def check_views(recipe, qwen, student_messages, privileged_texts):
    """Student prompts are transformers' for these messages; teacher prompts hold the information, or are the student's."""
    reference = PreTrainedTokenizerFast.from_pretrained(qwen)
    prompts = recipe._data.prompts
    assert len(prompts) == len(student_messages)
    for (_, pair), messages, privileged in zip(prompts, student_messages, privileged_texts, strict=True):
        assert pair.student == reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert "zyxquartz" not in reference.decode(pair.student)
        if privileged is None:
            assert pair.teacher == pair.student
        else:
            assert privileged in reference.decode(pair.teacher)


ROUND = ["prompts_per_round=4", "group_size=2", "updates_per_round=1", "minibatch_rollouts=8"]


def test_pi_distill_on_parquet_in_verl_layout(qwen, tmp_path):
    prompts = [[system("Think."), user(question)] for question in QUESTIONS]
    rows = [
        {
            "data_source": "apples",
            "prompt": prompt,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"split": "train", "index": i, "privileged_context": solution},
        }
        for i, (prompt, answer, solution) in enumerate(zip(prompts, ANSWERS, SOLUTIONS, strict=True))
    ]
    source = tmp_path / "train.parquet"
    Dataset.from_list(rows).to_parquet(source)
    dataset = {
        "_component_": "pidistill.data.qa_dataset",
        "source": str(source),
        "question_key": "prompt",
        "answer_key": "reward_model.ground_truth",
    }
    recipe, row = one_step("pi_distill_distributed", "0.5B_pi_distill", qwen, tmp_path / "run", dataset, *ROUND)
    check_views(recipe, qwen, prompts, SOLUTIONS)
    assert [example.reference for example, _ in recipe._data.prompts] == ANSWERS
    assert row["rows_without_pi"] == 0
    assert row["kl_teacher_student_nats"] > 0.01


CONVERSATIONS = [
    [user(QUESTIONS[0])],
    [system("Think."), user(QUESTIONS[1])],
    [user("Hello"), assistant("Hello, ask me."), user(QUESTIONS[2])],
    [user(QUESTIONS[3])],
]
PRIVILEGED = [
    [user(SOLUTIONS[0])],
    [user("Do you know?"), assistant(SOLUTIONS[1])],
    [user(SOLUTIONS[2])],
    None,
]


def chat_rows(path: Path, conversations):
    rows = zip(conversations, PRIVILEGED, ANSWERS, strict=True)
    rows = [{"messages": messages, "privileged_messages": given, "answer": answer} for messages, given, answer in rows]
    Dataset.from_list(rows).to_json(path)
    return {"_component_": "pidistill.data.chat_dataset", "source": str(path), "reference_key": "answer"}


@pytest.mark.parametrize("placement", ["before_user", "system_end"])
def test_opsd_on_jsonl_conversations(qwen, tmp_path, placement):
    dataset = chat_rows(tmp_path / "chat.jsonl", CONVERSATIONS)
    overrides = [*ROUND, f"privileged.placement={placement}"]
    recipe, row = one_step("opsd_distributed", "0.5B_opsd", qwen, tmp_path / "run", dataset, *overrides)
    check_views(recipe, qwen, CONVERSATIONS, [*SOLUTIONS[:3], None])
    assert row["rows_without_pi"] == 1
    assert row["kl_student_teacher_nats"] > 0.01


def test_sft_on_jsonl_conversations(qwen, tmp_path):
    """Only the last answer is learnt: of the conversation with two, the first is context."""
    answered = [
        [*conversation, assistant(f"The answer is {answer}.")]
        for conversation, answer in zip(CONVERSATIONS, ANSWERS, strict=True)
    ]
    dataset = chat_rows(tmp_path / "chat.jsonl", answered) | {"completion": "after_last_user"}
    overrides = ["batch_size=4"]
    recipe, row = one_step("sft_distributed", "0.5B_sft", qwen, tmp_path / "run", dataset, *overrides)
    check_views(recipe, qwen, CONVERSATIONS, [*SOLUTIONS[:3], None])
    reference = PreTrainedTokenizerFast.from_pretrained(qwen)
    learnt = [reference.encode(f"The answer is {answer}.<|im_end|>", add_special_tokens=False) for answer in ANSWERS]
    assert row["policy_tokens"] == sum(map(len, learnt))


# ------------------------------------------------------------------------------------------- refusals


def test_a_device_that_the_machine_lacks_is_refused(qwen, tmp_path):
    """torchtune would take another one; a run meant for a GPU would go on for days on the CPU."""
    cfg = load_config("qwen2_5/0.5B_opsd", [*small_model(qwen, tmp_path), "device=xpu"])
    with pytest.raises(InputError, match=r"device is xpu, which this machine does not show \(it has (cpu|cuda)\); set device="):
        set_up("opsd_distributed", cfg)
