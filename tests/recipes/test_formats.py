"""Test rows and models in the formats that people have, through one training step of a real recipe.

transformers reads what the step leaves as the model that was trained.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from pidistill.errors import InputError
from pidistill.models import from_hf
from pidistill.training.start import cleanup
from tests.support.hub_models import MODELS, assert_same_logits, reference
from tests.support.runs import save_config, shell, tune_command
from tests.support.tiny_qwen import VOCABULARY, load_config, qwen_checkpoint, read_metrics, set_up, small_model, use_model

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


def one_step(recipe, config, qwen, output_dir, dataset, *overrides, edit=lambda cfg: None):
    """The recipe after one step on ``dataset``, and the step's metrics; `dataset` replaces the config's, as an edit would."""
    overrides = [*small_model(qwen, output_dir), "max_steps=1", "sampler.max_new_tokens=8", "eval_dataset=null", *overrides]
    cfg = load_config(f"qwen2_5/{config}", overrides)
    cfg.dataset = dataset
    edit(cfg)
    made = set_up(recipe, cfg)
    made.train()
    row = read_metrics(Path(cfg.output_dir))[-1]
    assert all(math.isfinite(value) for value in row.values()) and row["grad_norm"] > 0 and row["policy_tokens"] > 0
    assert_same_logits(made._model, reference(Path(cfg.output_dir) / "latest"), VOCABULARY)
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


# ------------------------------------------------------------------------------------------- models

SHARDS = {"max_shard_size": "300KB"}
LORA = {"lora_attn_modules": ["q_proj", "k_proj", "output_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8.0}
STEPS = {
    "opsd_distributed": ("0.5B_opsd", ["qwen2", "qwen3", "llama3.1", "r1-distill-qwen"]),
    "pi_distill_distributed": ("0.5B_pi_distill", ["qwen2, tied", "qwen3, tied", "llama3.2, tied"]),
}


def step_of(recipe, name, tmp_path, *overrides, lora=None, **layout):
    """One step with a learning rate that no rounding hides; (recipe, the folder that it began with, the one that it left)."""
    folder = tmp_path / "model"
    if not folder.exists():
        qwen_checkpoint(folder, [*QUESTIONS, *SOLUTIONS], name, **layout)
    dataset = chat_rows(tmp_path / "chat.jsonl", CONVERSATIONS)
    overrides = [*ROUND, "optimizer.lr=1e-2", *overrides]

    def edit(cfg):
        use_model(cfg, name, lora)
        cfg.lr_scheduler = None  # its first step would be at a rate of 0

    made, _ = one_step(recipe, STEPS[recipe][0], folder, tmp_path / "run", dataset, *overrides, edit=edit)
    return made, folder, tmp_path / "run" / "latest"


@pytest.mark.parametrize(("recipe", "name"), [(recipe, name) for recipe, (_, names) in STEPS.items() for name in names])
def test_every_family_trains_and_leaves_what_transformers_reads(recipe, name, tmp_path):
    made, before, after = step_of(recipe, name, tmp_path, **SHARDS)
    assert {p.name for p in after.iterdir()} == {p.name for p in before.iterdir()} | {"training_state.pt"}
    assert len(list(after.glob("*.safetensors"))) > 1
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(made._model, reference(before), VOCABULARY)


@pytest.mark.parametrize("name", ["qwen3", "qwen3, tied"])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_adapters_of_qwen3_are_what_transformers_reads(name, dora, tmp_path):
    made, before, _ = step_of("opsd_distributed", name, tmp_path, lora=LORA | {"use_dora": dora})
    first = load_file(before / "model.safetensors")
    trained = {key for key, tensor in made._model.named_parameters() if tensor.requires_grad}
    assert len(trained) == 2 * 6 * (3 if dora else 2)
    frozen = from_hf(first, json.loads((before / "config.json").read_text()))
    assert all(torch.equal(frozen[key], made._model.state_dict()[key]) for key in frozen)


def test_a_resumed_run_reads_its_own_folder_by_its_index(tmp_path):
    """Two steps at once, and one after the other: equal to the bit, in as many files."""
    whole, *_ = step_of("opsd_distributed", "qwen3", tmp_path, "max_steps=2", f"output_dir={tmp_path}/whole", **SHARDS)
    step_of("opsd_distributed", "qwen3", tmp_path)
    resumed, _, after = step_of("opsd_distributed", "qwen3", tmp_path, "max_steps=2", "resume_from_checkpoint=True")
    assert after.resolve().name == "step_2"
    for (key, one), two in zip(whole._model.named_parameters(), resumed._model.parameters(), strict=True):
        assert torch.equal(one, two), key


@pytest.mark.slow(reason="test_two_processes.py has two processes, and this file trains each family on one")
def test_two_processes_train_qwen3_as_one_does(tmp_path):
    """FSDP2: sampling, tree packing, a step and the saved folder, by `tune run`."""
    one, *_ = step_of("opsd_distributed", "qwen3", tmp_path, **SHARDS)
    expected = read_metrics(tmp_path / "run")[-1]
    cleanup()
    cfg = OmegaConf.load(tmp_path / "run" / "config.yaml")
    cfg.output_dir = str(tmp_path / "two")
    config = save_config(cfg, tmp_path / "two.yaml")
    recipe = "recipes/opsd_distributed.py"
    done = shell(tune_command("run", "--nproc_per_node", "2", recipe, "--config", str(config)), timeout_s=240)
    assert done.returncode == 0, done.stderr[-3000:]
    row = read_metrics(tmp_path / "two")[-1]
    for key in ("loss", "grad_norm", "policy_tokens", "kl_student_teacher_nats"):
        assert row[key] == pytest.approx(expected[key], rel=1e-4), key
    # AdamW's first step is the gradient's sign, also where the gradient is rounding.
    assert_same_logits(one._model, reference(tmp_path / "two" / "latest"), VOCABULARY, atol=5e-3)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(one._model, reference(tmp_path / "model"), VOCABULARY, atol=0.1)


def test_there_is_a_step_of_every_family():
    assert {name for _, names in STEPS.values() for name in names} == MODELS.keys() - {"llama3"}


# ------------------------------------------------------------------------------------------- refusals


def test_a_folder_of_another_model_is_refused_before_anything_else(qwen, tmp_path):
    cfg = load_config("qwen2_5/0.5B_opsd", small_model(qwen, tmp_path))
    cfg.model = {"_component_": "pidistill.models.qwen3_0_6b"}
    cfg.checkpointer = {
        "_component_": "pidistill.models.HFCheckpointer",
        "checkpoint_dir": cfg.checkpointer.checkpoint_dir,
    }
    with pytest.raises(
        InputError, match=r"config.json says model_type=qwen2, hidden_size=64, .*pidistill.models.qwen3_0_6b has"
    ):
        set_up("opsd_distributed", cfg)


def test_a_device_that_the_machine_lacks_is_refused(qwen, tmp_path):
    """torchtune would take another one; a run meant for a GPU would go on for days on the CPU."""
    cfg = load_config("qwen2_5/0.5B_opsd", [*small_model(qwen, tmp_path), "device=xpu"])
    with pytest.raises(InputError, match=r"device is xpu, which this machine does not have \(it has (cpu|cuda)\); set device="):
        set_up("opsd_distributed", cfg)
