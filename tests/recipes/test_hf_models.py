"""Whole recipes with decoders of transformers: every family takes a step; saving, resuming, adapters, teachers, processes."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

from tests.support.forks import launch_several
from tests.support.hf_families import FAMILIES, ROPE, SIZES, reference_model
from tests.support.hub_models import reference
from tests.support.runs import (
    EMA,
    EVALUATION,
    assert_close_rows,
    assert_same_tensors,
    back_to_checkpoint,
    metrics,
    run,
    small_config,
    training_state,
    weights,
)

VOCABULARY = 85  # the words of the tiny world
LORA = {
    "model__lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "model__apply_lora_to_mlp": True,
    "model__lora_rank": 4,
}
MIXED = {"dtype": "fp32", "compute_dtype": "bf16"}
FROZEN = {"_component_": "pidistill.teachers.FrozenTeacher", "cache_gib": 0.01}
ADAPTER_OFF = {"_component_": "pidistill.teachers.AdapterOffTeacher", "cache_gib": 0.01}
ONE_STEP = {"max_steps": 1, "prompts_per_round": 1, "group_size": 2, "optimizer__lr": 1e-2, "lr_scheduler": None}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """family → a folder as on the Hub."""
    made = {}

    def folder(name: str, layers: int = 2) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("family")
            more = {"vocab_size_per_layer_input": VOCABULARY} if name == "gemma4" else {}
            family = name
            if name == TWO_DTYPES:
                two_dtypes().save_pretrained(made[name])
                return made[name]
            if name == IN_BLOCKS:
                family = "qwen3"
                more = {"hidden_size": 128, "num_key_value_heads": 4, "intermediate_size": 128}
            reference_model(family, vocab_size=VOCABULARY, **more).save_pretrained(made[name])
        return made[name]

    return folder


def two_dtypes():
    """Return a GLM4-MoE in bf16, whose router transformers keeps in fp32; some layers have no experts."""
    import transformers

    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
    sizes = SIZES | experts | {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "head_dim": 16, "first_k_dense_replace": 1}
    config = transformers.Glm4MoeConfig(**sizes, rope_parameters=dict(ROPE))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def hf_config(method: str, folder: Path, output_dir: Path, backend: str = "transformers", **changes):
    """A small config of the tiny world with the model of ``folder``, as a user would write it."""
    cfg = small_config(method, folder, output_dir)
    cfg.model = {"_component_": "pidistill.models.from_folder", "path": str(folder), "backend": backend, "max_seq_len": 96}
    cfg.checkpointer = {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(folder)}
    for key, value in changes.items():
        from omegaconf import OmegaConf

        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False, force_add=True)
    return cfg


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids)


# One without and one with experts, and one that carries a state; tests/scoring has frozen teachers of other families.
BOTH_RECIPES = ("gemma4", "gpt_oss, sinks and window", "qwen3_5, hybrid")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_both_recipes_is_taken_and_saved_for_transformers(name, folders, tmp_path):
    recipe = run("pi_distill", hf_config("pi_distill", folders(name), tmp_path / "pi", **ONE_STEP))
    rows = metrics(tmp_path / "pi")
    if name in BOTH_RECIPES:
        run("opsd", hf_config("opsd", folders(name), tmp_path / "opsd", teacher=FROZEN, **ONE_STEP))
        rows += metrics(tmp_path / "opsd")
    for row in rows:
        assert row["grad_norm"] > 0 and row["sampler_mismatch_max_nats"] < 2e-3
    ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    saved, before = reference(tmp_path / "pi" / "latest"), reference(folders(name))
    ours = logits_of(recipe._model.eval(), ids)
    theirs, first = (logits_of(lambda x, lm=lm: lm(x, use_cache=False).logits, ids) for lm in (saved, before))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    assert float((theirs - first).abs().max()) > 0.01  # the step moved it


IN_BLOCKS = "qwen3 with matrices of whole blocks of NF4"
TWO_DTYPES = "glm4_moe, router in fp32"
RESUMED = {
    "mixed precision, checkpointing, EMA": (
        "gemma3",
        "opsd",
        MIXED | {"enable_activation_checkpointing": True, "teacher": EMA},
    ),
    "mixture of experts": ("qwen3_moe", "pi_distill", {"model__router_loss_weight": 0.01}),
    "hybrid": ("qwen3_5, hybrid", "opsd", {"teacher": FROZEN, **MIXED}),
    "LoRA": ("phi3", "opsd", {"teacher": ADAPTER_OFF, **LORA, "model__lora_attn_modules": ["qkv_proj"]}),
    "DoRA in mixed precision": (
        "llama, tied (SmolLM2)",
        "opsd",
        {"teacher": ADAPTER_OFF, **LORA, **MIXED, "model__use_dora": True},
    ),
    "QLoRA": (IN_BLOCKS, "opsd", {"teacher": ADAPTER_OFF, **LORA, "model__quantize_base": True}),
    "QLoRA in mixed precision": (IN_BLOCKS, "opsd", {"teacher": EMA, **LORA, **MIXED, "model__quantize_base": True}),
    "sft": ("gemma2, caps", "sft", {}),
    "router in fp32 beside weights in bf16": (TWO_DTYPES, "opsd", {"dtype": "bf16", "teacher": EMA}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_stopped_run_resumes_to_the_bit(case, folders, tmp_path):
    name, method, changes = RESUMED[case]
    config = functools.partial(hf_config, method, folders(name), save_every_steps=2, **changes)
    run(method, config(tmp_path / "whole"))
    back_to_checkpoint(tmp_path / "whole", tmp_path / "stopped")
    run(method, config(tmp_path / "stopped", resume_from_checkpoint=True))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    logged = [row.get("router_loss", 0.0) for row in metrics(tmp_path / "whole") if "loss" in row]
    assert all(value > 0 for value in logged) if name == "qwen3_moe" else not any(logged)
    assert_same_tensors(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    assert_same_tensors(training_state(tmp_path / "stopped"), training_state(tmp_path / "whole"))


def test_a_saved_adapter_on_the_base_is_the_saved_model(folders, tmp_path, monkeypatch):
    """W + (α/r)·B·A of PEFT's names is the merged weight, for the layers that were asked for; and peft makes the same model."""
    name = "llama, tied (SmolLM2)"
    run("opsd", hf_config("opsd", folders(name), tmp_path, teacher=ADAPTER_OFF, **LORA, **ONE_STEP))
    adapter = load_file(tmp_path / "latest" / "adapter" / "adapter_model.safetensors")
    base, merged = load_file(folders(name) / "model.safetensors"), weights(tmp_path)
    layers = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in adapter}
    assert {layer.rpartition(".")[2] for layer in layers} == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for key, weight in base.items():
        layer = key.removesuffix(".weight")
        if layer in layers:
            a, b = (adapter[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
            assert b.abs().max() > 0
            weight = weight + (16 / 4) * (b @ a)
        torch.testing.assert_close(merged[key], weight, atol=1e-6, rtol=1e-5)
    peft = pytest.importorskip("peft", reason="the test extra has peft")
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    adapted = peft.PeftModel.from_pretrained(reference(folders(name)), tmp_path / "latest" / "adapter")
    theirs, saved = (logits_of(lambda x, lm=lm: lm(x).logits, ids) for lm in (adapted, reference(tmp_path / "latest")))
    torch.testing.assert_close(theirs, saved, atol=2e-5, rtol=1e-5)
    again = hf_config("opsd", folders(name), tmp_path / "again", adapter_dir=str(tmp_path / "latest" / "adapter"), **ONE_STEP)
    plain = run("opsd", again, lambda recipe: assert_same_tensors(dict(recipe._model.state_dict()), dict(merged)))
    assert plain._step == 1


@pytest.mark.parametrize("student", ["torchtune", "transformers"])
def test_a_teacher_of_the_other_backend_gives_the_same_numbers(student, folders, tmp_path):
    """The same weights in both kinds: nothing to learn but the hint; with transformers' the divergence is torchtune's."""
    name = "llama, tied (SmolLM2)"
    teacher = "transformers" if student == "torchtune" else "torchtune"
    rows = []
    for kind in (teacher, student):
        cfg = hf_config("opsd", folders(name), tmp_path / kind, backend=student, teacher=FROZEN, **ONE_STEP)
        cfg.teacher_model = {**cfg.model, "backend": kind}
        cfg.teacher_checkpointer = dict(cfg.checkpointer)
        run("opsd", cfg)
        rows.append(metrics(tmp_path / kind))
    assert_close_rows(*rows, rel=2e-4)


def test_both_backends_train_alike(folders, tmp_path):
    """Four steps of π-Distill on one folder: the same rollouts and the same numbers, evaluation included."""
    name = "llama, tied (SmolLM2)"
    for backend in ("torchtune", "transformers"):
        run("pi_distill", hf_config("pi_distill", folders(name), tmp_path / backend, backend=backend, **EVALUATION))
    assert_close_rows(metrics(tmp_path / "torchtune"), metrics(tmp_path / "transformers"), rel=2e-4)


def test_two_processes_read_frozen_weights_of_two_dtypes(folders, tmp_path):
    """A teacher or an evaluated model gets no gradients, so that a router in fp32 may stand beside weights in bf16."""
    folder = folders(TWO_DTYPES)
    sized = {"dataset__max_rows": 4, "eval_samples": 2, "dtype": "bf16"}
    changes = ONE_STEP | MIXED | {"prompts_per_round": 2, "teacher": FROZEN}
    runs = {
        "opsd": ("opsd", hf_config("opsd", folder, tmp_path / "opsd", **changes)),
        "evaluate": ("evaluate", hf_config("evaluate", folder, tmp_path / "evaluate", **sized)),
    }
    launch_several(tmp_path / "several", runs)
    assert metrics(tmp_path / "opsd")[0]["grad_norm"] > 0
    assert (tmp_path / "evaluate" / "results.json").is_file()


@pytest.mark.slow(reason="test_two_processes.py trains on two processes, and this file each family on one")
@pytest.mark.parametrize("method", ["pi_distill", "opsd"])
def test_two_processes_equal_one_for_every_family(method, folders, tmp_path):
    def config(name, folder):
        changes = {"max_steps": 2, "prompts_per_round": 3, "micro_batch_tokens": 200}
        changes |= {"teacher": EMA} if method == "opsd" else {}
        return hf_config(method, folders(name), folder / str(list(FAMILIES).index(name)), **changes)

    launch_several(tmp_path / "several", {name: (method, config(name, tmp_path / "two")) for name in FAMILIES})
    for name in FAMILIES:
        one = config(name, tmp_path / "one")
        run(method, one)
        two = metrics(tmp_path / "two" / Path(one.output_dir).name)
        assert_close_rows(metrics(Path(one.output_dir)), two, rel=1e-3)
        assert any(row.get("grad_norm", 0.0) > 0 for row in two), name
