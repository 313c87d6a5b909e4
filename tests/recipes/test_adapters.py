"""Test DoRA, QLoRA and a start from an adapter by config: both recipes, one process and two."""

import functools
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import disable_adapter

from pidistill.errors import InputError
from pidistill.models.adapter_dir import base_config
from pidistill.models.adapters import adapter_modules, has_adapters
from pidistill.models.nf4 import check_shapes, is_nf4, rounded
from pidistill.models.peft_format import FOLDER, read
from pidistill.testing import TINY_SIZES
from tests.recipes.conftest import WIDE
from tests.support.forks import launch_several
from tests.support.lora import ADAPTER_OFF, FROZEN, LORA, lora_run, plain_model
from tests.support.runs import (
    EMA,
    assert_same_tensors,
    back_to_checkpoint,
    metrics,
    run,
    small_config,
    training_state,
    weights,
)

DORA = LORA | {"model__use_dora": True}
TOKENS = torch.arange(12).view(2, 6)


def assert_close_weights(one, two, rtol=1e-4, atol=1e-5):
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


# ------------------------------------------------------------------------------------------- DoRA


@pytest.mark.parametrize("method", ["opsd", "pi_distill"])
def test_dora_trains_its_magnitudes_and_is_saved_merged(method, tiny_base, tmp_path):
    recipe = lora_run(tiny_base, tmp_path, method, **DORA)
    first = weights(tiny_base.parent, tiny_base.name)["model.layers.0.mlp.gate_proj.weight"]
    layer = recipe._model.layers[0].mlp.w1
    assert not torch.allclose(layer.magnitude, torch.linalg.norm(first, dim=1), rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(plain_model(tmp_path)(TOKENS), recipe._model(TOKENS), rtol=1e-4, atol=1e-4)
    adapter = read(tmp_path / "latest" / FOLDER, base_config(str(tiny_base)))
    assert adapter.dora and {f"{name}.magnitude" for name, _ in adapter_modules(recipe._model)} <= adapter.tensors.keys()
    for name, tensor in training_state(tmp_path)["adapters"].items():
        assert torch.equal(adapter.tensors[name], tensor), name


def test_dora_switched_off_is_the_base(tiny_base, tmp_path):
    """The trained model without its adapters gives the base model's logits, and the run with it that with a frozen copy."""
    recipe = lora_run(tiny_base, tmp_path / "off", **DORA)
    base = small_config("opsd", tiny_base, tmp_path / "base", max_steps=1, optimizer__lr=0.0)
    plain = run("opsd", base)._model
    with torch.no_grad():
        with disable_adapter(recipe._model):
            off = recipe._model(TOKENS)
        assert (recipe._model(TOKENS) - off).abs().max() > 0.01
        torch.testing.assert_close(off, plain(TOKENS), rtol=1e-5, atol=1e-5)
    lora_run(tiny_base, tmp_path / "frozen", teacher=FROZEN, **DORA)
    for ours, theirs in zip(metrics(tmp_path / "off"), metrics(tmp_path / "frozen"), strict=True):
        for key in ours.keys() - {"alarms"}:  # sentences, whose numbers may round differently
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (ours["step"], key)


# ------------------------------------------------------------------------------------------- from an adapter


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dora")
    return lora_run(tiny_base, folder, max_steps=2, **DORA), folder


def test_training_goes_on_from_an_adapter(trained, tiny_base, tmp_path):
    """Its first step sees the adapter's model as the student and, with the adapters off, the base as the teacher."""
    before, folder = trained
    adapter = {"adapter_dir": str(folder / "latest" / FOLDER), "max_steps": 1, "optimizer__lr": 0.0}
    after = lora_run(tiny_base, tmp_path, **(DORA | adapter))
    with torch.no_grad():
        torch.testing.assert_close(after._model(TOKENS), before._model(TOKENS))
    assert metrics(tmp_path)[0]["kl_teacher_student_nats"] > 1e-3
    assert training_state(tmp_path)["base"].equal(training_state(folder)["base"])


@pytest.mark.parametrize("teacher", [FROZEN, EMA], ids=["frozen", "ema"])
def test_an_initial_teacher_has_the_adapter_too(teacher, trained, tiny_base, tmp_path):
    _, folder = trained
    adapter = {"adapter_dir": str(folder / "latest" / FOLDER), "max_steps": 1, "optimizer__lr": 0.0}
    recipe = lora_run(tiny_base, tmp_path, teacher=teacher, **(DORA | adapter))
    with torch.no_grad():
        torch.testing.assert_close(recipe._teacher.module(TOKENS), recipe._model(TOKENS))


def test_a_run_without_adapters_starts_from_the_merged_model(trained, tiny_base, tmp_path):
    before, folder = trained
    adapter = {"adapter_dir": str(folder / "latest" / FOLDER), "optimizer__lr": 0.0}
    one = run("opsd", small_config("opsd", tiny_base, tmp_path, max_steps=1, **adapter))
    assert not has_adapters(one._model)
    # Resumed, the adapter is in the checkpoint's weights already.
    two = run("opsd", small_config("opsd", tiny_base, tmp_path, max_steps=2, resume_from_checkpoint=True, **adapter))
    assert not (tmp_path / "latest" / FOLDER).exists()
    with torch.no_grad():
        for recipe in (one, two):
            torch.testing.assert_close(recipe._model(TOKENS), before._model(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plain", [True, False], ids=["merged", "beside"])
def test_evaluation_of_a_base_with_an_adapter_is_that_of_the_merged_checkpoint(plain, trained, tiny_base, tmp_path):
    _, folder = trained
    rows = {"dataset__max_rows": 3}
    run("evaluate", small_config("evaluate", folder / "latest", tmp_path / "merged", **files(folder), **rows))
    model = {} if plain else {key: value for key, value in DORA.items() if key.startswith("model")}
    adapter = {"adapter_dir": str(folder / "latest" / FOLDER)} | model
    run("evaluate", small_config("evaluate", tiny_base, tmp_path / "adapter", **adapter, **rows))
    one, two = ((tmp_path / name / "results.json").read_text() for name in ("merged", "adapter"))
    assert one == two


def files(folder):
    return {"checkpointer__checkpoint_files": [path.name for path in (folder / "latest").glob("*.safetensors")]}


# ------------------------------------------------------------------------------------------- QLoRA

QLORA = LORA | WIDE | {"model__quantize_base": True, "optimizer__lr": 1e-2}


def four_bits(base, folder):
    """A copy of the checkpoint with every matrix but embedding and head as it is after NF4."""
    copied = shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    quantized = {
        name: rounded(tensor) if ".layers." in name and tensor.ndim == 2 else tensor for name, tensor in tensors.items()
    }
    save_file(quantized, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


@pytest.mark.parametrize(("method", "dora"), [("opsd", False), ("pi_distill", True)], ids=["lora", "dora"])
def test_qlora_is_lora_on_the_dequantized_base(method, dora, wide_base, tmp_path):
    """The whole run, step by step, and what it saves; torchtune's hook would round what is saved to bf16."""
    changes = QLORA | {"model__use_dora": dora, "enable_activation_checkpointing": method == "pi_distill"}
    ours = lora_run(wide_base, tmp_path / "ours", method, **changes)
    assert [name for name, p in ours._model.named_parameters() if is_nf4(p)]
    assert not is_nf4(ours._model.output.weight)
    base = four_bits(wide_base, tmp_path / "base")
    theirs = lora_run(base, tmp_path / "theirs", method, **(changes | {"model__quantize_base": False}))
    with torch.no_grad():
        torch.testing.assert_close(ours._model(TOKENS), theirs._model(TOKENS), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(plain_model(tmp_path / "ours")(TOKENS), ours._model(TOKENS), rtol=1e-4, atol=1e-3)
    for row, expected in zip(metrics(tmp_path / "ours"), metrics(tmp_path / "theirs"), strict=True):
        for key in row:
            assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), (row["step"], key)
    assert_close_weights(*(weights(tmp_path / name) for name in ("ours", "theirs")), atol=1e-4)


def test_a_resumed_qlora_run_is_the_whole_run_to_the_bit(wide_base, tmp_path):
    changes = QLORA | {"save_every_steps": 2}
    lora_run(wide_base, tmp_path / "whole", **changes)
    back_to_checkpoint(tmp_path / "whole", tmp_path / "cut")
    lora_run(wide_base, tmp_path / "cut", resume_from_checkpoint=True, **changes)
    whole, cut = (training_state(tmp_path / name) for name in ("whole", "cut"))
    for key in ("adapters", "optimizer", "step"):
        assert_same_tensors(whole[key], cut[key], key)
    assert_same_tensors(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.slow(reason="test_lora.py trains adapters on two processes")
def test_two_processes_end_where_one_does(tiny_base, wide_base, tmp_path):
    runs = {}
    for name, method, base, changes in (
        ("dora", "opsd", tiny_base, DORA),
        ("qdora", "pi_distill", wide_base, QLORA | {"model__use_dora": True}),
    ):
        config = functools.partial(small_config, method, base, teacher=ADAPTER_OFF, max_steps=2, **changes)
        run(method, config(tmp_path / "one" / name))
        runs[name] = (method, config(tmp_path / "two" / name))
    launch_several(tmp_path / "several", runs)
    for name in runs:
        assert_close_weights(*(weights(tmp_path / ranks / name) for ranks in ("one", "two")), atol=1e-4)


def test_matrices_that_4_bits_cannot_hold_are_refused(tiny_base, tmp_path):
    with pytest.raises(InputError, match="cannot store this model in 4 bits .*; set model.quantize_base=False"):
        lora_run(tiny_base, tmp_path, **(LORA | {"model__quantize_base": True}))


def test_shards_that_4_bits_cannot_hold_are_refused():
    sizes = TINY_SIZES | {"embed_dim": 256, "num_kv_heads": 1}
    with torch.device("meta"):
        model = lora_llama3(["q_proj"], lora_rank=2, lora_alpha=2.0, quantize_base=True, vocab_size=40, **sizes)
    check_shapes(model, 1)
    with pytest.raises(InputError, match="on each of 2 ranks is a multiple of 16384 elements, and .* is 64x256; set"):
        check_shapes(model, 2)
