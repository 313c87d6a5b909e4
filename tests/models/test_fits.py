"""Test that a checkpoint folder of another model is refused in one sentence, before any weight is loaded."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from pidistill.errors import InputError
from pidistill.models.fits import check_fits
from pidistill.training.checkpoint_source import check_checkpoint_fits
from tests.support.hub_models import LLAMA31_ROPE, MODELS, VOCABULARY, empty, hub_folder

OURS, TORCHTUNES = "pidistill.models.HFCheckpointer", "torchtune.training.FullModelHFCheckpointer"


def check(name, folder, *, component=OURS, files=None, **more):
    with torch.device("meta"):
        model = empty(name, **more)
    node = {"_component_": component, "checkpoint_dir": str(folder), "checkpoint_files": files}
    check_fits(model, node, builder="the.builder", key="checkpointer")


def refusal(*args, **kwargs):
    with pytest.raises(InputError) as error:
        check(*args, **kwargs)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    return hub_folder("qwen3", tmp_path / "model", max_shard_size="100KB")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder, change):
    """``change``: {name: tensor} of one file, edited in place; applied to all files, the index following."""
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index["weight_map"] = {k: f for k, f in index["weight_map"].items() if f != file} | dict.fromkeys(tensors, file)
    index_file.write_text(json.dumps(index))


@pytest.mark.parametrize("name", MODELS)
def test_every_family_fits_its_own_builder_and_no_other(name, tmp_path):
    folder = hub_folder(name, tmp_path / "model")
    check(name, folder)
    for other in MODELS.keys() - {name, *({"qwen2", "r1-distill-qwen"} if "qwen" in name else ())}:
        assert "is another model than the.builder builds" in refusal(other, folder), other


def test_the_sizes_that_differ_are_named_on_both_sides(folder):
    sizes = {"embed_dim": 32, "num_layers": 3, "head_dim": 8, "num_kv_heads": 1, "num_heads": 8, "intermediate_dim": 64}
    said = refusal("qwen3", folder, **sizes, vocab_size=99)
    assert (
        "config.json says hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, "
        "intermediate_size=128, vocab_size=128, and the.builder has hidden_size=32, num_hidden_layers=3, "
        "num_attention_heads=8, num_key_value_heads=1, head_dim=8, intermediate_size=64, vocab_size=99; set `model`"
    ) in said
    assert str(folder) in said and "checkpointer.checkpoint_dir" in said


def test_family_tying_and_rotations_are_compared_too(folder):
    assert "says model_type=qwen3, head_dim=32, and the.builder has model_type=llama, head_dim=16;" in refusal("llama3", folder)
    assert "tie_word_embeddings=False, and the.builder has tie_word_embeddings=True" in refusal("qwen3, tied", folder)
    # Qwen3-4B-Instruct-2507 has Qwen3-4B's shapes and another base: no tensor would tell.
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 5e6})
    assert "rope_theta=5e+06, and the.builder has rope_theta=10000;" in refusal("qwen3", folder)
    check("qwen3", folder, rope_base=5_000_000)


def test_rotary_scaling_is_read_in_both_layouts(tmp_path):
    folder = hub_folder("llama3.1", tmp_path / "model")
    assert "rope_scaling=llama3(factor 8, low_freq_factor 1," in refusal("llama3", folder)
    assert "rope_scaling=None" in refusal("llama3", folder)
    old = {key: value for key, value in LLAMA31_ROPE.items() if key != "rope_theta"}
    change_config(folder, rope_parameters=None, rope_theta=LLAMA31_ROPE["rope_theta"], rope_scaling=old)
    check("llama3.1", folder)
    change_config(folder, rope_scaling=old | {"factor": 32.0})
    assert "llama3(factor 32, low" in refusal("llama3.1", folder) and "llama3(factor 8, low" in refusal("llama3.1", folder)
    change_config(folder, rope_scaling={"type": "yarn", "factor": 4.0})
    assert "rotations of the kind 'yarn', and the kinds default and llama3 are computed here" in refusal("llama3.1", folder)


def test_another_epsilon_is_a_warning(folder, caplog):
    """Builders of some sizes have one that differs from the Hub's, and the effect is in the last digits."""
    change_config(folder, rms_norm_eps=1e-6)
    with caplog.at_level(logging.WARNING):
        check("qwen3", folder)
    assert "says rms_norm_eps=1e-06, and the.builder has 1e-05" in caplog.text


def test_tensors_that_are_absent_or_too_many_or_of_another_shape_are_named(folder, tmp_path):
    norm = "model.layers.1.self_attn.k_norm.weight"
    copies = [shutil.copytree(folder, tmp_path / name) for name in ("absent", "extra", "shape", "frequencies")]
    change_tensors(copies[0], lambda tensors: tensors.pop(norm, None))
    assert f"has no tensor {norm}, which the.builder needs; the folder is incomplete" in refusal("qwen3", copies[0])
    change_tensors(copies[1], lambda tensors: tensors.update({"model.extra": torch.ones(1)} if norm in tensors else {}))
    assert "has tensor model.extra (model-0000" in refusal("qwen3", copies[1])
    change_tensors(copies[2], lambda tensors: tensors.update({norm: torch.ones(16)} if norm in tensors else {}))
    said = refusal("qwen3", copies[2])
    assert f"tensor {norm} in {copies[2]}/model-0000" in said and "has shape [16], and the.builder needs [32]" in said
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}  # in old exports
    change_tensors(copies[3], lambda tensors: tensors.update(inv_freq if norm in tensors else {}))
    check("qwen3", copies[3])


def test_files_that_are_absent_or_cut_short_are_named(folder):
    files = sorted(folder.glob("*.safetensors"))
    whole = files[1].read_bytes()
    files[1].unlink()
    said = refusal("qwen3", folder)
    assert f"lacks 1 of {len(files)} weight files, {files[1].name}, that its model.safetensors.index.json names" in said
    for length in (0, 5, 60, len(whole) - 1):  # nothing, half a length, half a header, all but the last byte
        files[1].write_bytes(whole[:length])
        said = refusal("qwen3", folder)
        assert f"{files[1]} ({length:,} bytes) is not a whole safetensors file" in said
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "names none" in refusal("qwen3", folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json (it holds config.json," in refusal("qwen3", folder)
    (folder / "pytorch_model.bin").touch()
    assert "save it once with transformers" in refusal("qwen3", folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal("qwen3", folder)


def test_torchtunes_checkpointer_is_checked_as_well_where_the_family_is_known(folder):
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    check("qwen3", folder, component=TORCHTUNES, files=files)
    assert "has no tensor" in refusal("qwen3", folder, component=TORCHTUNES, files=files[1:])
    assert "hidden_size=64" in refusal("qwen3", folder, component=TORCHTUNES, files=files, embed_dim=128)
    change_config(folder, model_type="gemma2")
    check("qwen3", folder, component=TORCHTUNES, files=files)
    assert "model_type 'gemma2', and weights are converted for llama, mistral, qwen2, qwen3" in refusal("qwen3", folder)


def test_the_config_says_which_model_a_checkpointer_belongs_to(folder, tmp_path):
    sizes = {"vocab_size": VOCABULARY, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "max_seq_len": 256}
    sizes |= {"intermediate_dim": 128, "rope_base": 10_000, "norm_eps": 1e-5}
    node = {"_component_": OURS, "checkpoint_dir": str(folder)}
    config = {
        "model": {"_component_": "pidistill.models.qwen3", **sizes, "head_dim": 16},
        "teacher_model": {"_component_": "pidistill.models.lora_qwen3", **sizes, "head_dim": 32}
        | {"lora_attn_modules": ["q_proj"], "lora_rank": 2, "lora_alpha": 4, "use_dora": True, "apply_lora_to_output": True},
        "checkpointer": node,
        "teacher_checkpointer": node,
    }
    cfg = OmegaConf.create(config)
    check_checkpoint_fits(cfg, "teacher_checkpointer")
    with pytest.raises(InputError, match=r"another model than pidistill.models.qwen3 builds: .*head_dim=32.*set `model`"):
        check_checkpoint_fits(cfg, "checkpointer")
    cfg.teacher_model.head_dim = 16
    with pytest.raises(InputError, match=r"set `teacher_model` .*teacher_checkpointer.checkpoint_dir"):
        check_checkpoint_fits(cfg, "teacher_checkpointer")


def test_a_quantised_folder_is_refused_as_quantised(folder):
    change_config(folder, quantization_config={"quant_method": "fp8"})
    assert "quantised (fp8" in refusal("qwen2", folder)


def test_a_tied_llama_without_rotary_scaling_fits_the_builder_with_a_factor_of_one(caplog):
    from torchtune.models.llama3_2 import llama3_2

    from pidistill.models.fits import check_config_fits

    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}
    config |= {"num_key_value_heads": 2, "intermediate_size": 96, "rms_norm_eps": 9.999999747378752e-06, "rope_theta": 1e5}
    config |= {"rope_scaling": None, "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    sizes = {"rope_base": 100_000, "intermediate_dim": 96, "norm_eps": 1e-5}
    check_config_fits(
        llama3_2(32, 1, 4, 2, 64, 64, **sizes, scale_factor=1), config, Path("FOLDER"), "llama3_2", "checkpointer"
    )
    assert not caplog.records
    with pytest.raises(InputError, match="rope_scaling"):
        check_config_fits(
            llama3_2(32, 1, 4, 2, 64, 64, **sizes, scale_factor=32), config, Path("FOLDER"), "llama3_2", "checkpointer"
        )
