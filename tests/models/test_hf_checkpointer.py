"""Test that transformers reads the same model from the folders that we read and from those that we write."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtune.training import MODEL_KEY

from pidistill.errors import InputError
from pidistill.models import HFCheckpointer
from pidistill.rollouts import TorchtuneSampler
from pidistill.training.training_state import check_weights, weight_marks
from tests.support.hf_families import ROPE, SIZES, reference_model
from tests.support.hub_models import MODELS, assert_same_logits, hub_folder, loaded, reference

SHARDS = {"max_shard_size": "100KB"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name, **more):
        key = (name, *more)
        if key not in made:
            made[key] = hub_folder(name, tmp_path_factory.mktemp("hub") / "model", **more)
        return made[key]

    return folder


def checkpointer(folder, output_dir, **more):
    return HFCheckpointer(checkpoint_dir=str(folder), output_dir=str(output_dir), **more)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_transformers(folders, name):
    ours, theirs = loaded(name, folders(name)), reference(folders(name))
    assert_same_logits(ours, theirs)
    prompt = [5, 9, 2, 77, 31]
    (sample,) = TorchtuneSampler(temperature=0.0, max_new_tokens=24).sample(
        ours, [prompt], group_size=1, seeds=[0], stop_ids=frozenset(), pad_id=0, on_turn_end=lambda *_: None
    )
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert sample.tokens == expected[0, len(prompt) :].tolist()
    assert len(set(sample.tokens)) > 3


@pytest.mark.parametrize("layout", [{}, SHARDS], ids=["one file", "shards"])
@pytest.mark.parametrize("name", MODELS)
def test_a_changed_model_is_saved_in_the_layout_it_came_in(folders, tmp_path, name, layout):
    source = folders(name, **layout)
    model = loaded(name, source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    checkpointer(source, tmp_path).save_checkpoint({MODEL_KEY: model.state_dict()}, epoch=0)
    saved = tmp_path / "epoch_0"
    assert {p.name for p in saved.iterdir()} == {p.name for p in source.iterdir()}
    files = sorted(p.name for p in source.glob("*.safetensors"))
    assert (len(files) > 3) is bool(layout)
    for file in files:
        assert load_file(saved / file).keys() == load_file(source / file).keys(), file
    if layout:
        before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (source, saved))
        assert after["weight_map"] == before["weight_map"]
        assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    assert_same_logits(model, reference(saved))
    assert_same_logits(loaded(name, saved), reference(saved))  # a run that starts from it


def test_a_tied_head_in_the_files_is_read_over_and_not_listed_again(folders, tmp_path):
    """Some tied checkpoints hold lm_head.weight in a file of its own and in their index."""
    source = shutil.copytree(folders("qwen3, tied", **SHARDS), tmp_path / "source")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    embedding = load_file(source / index["weight_map"]["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    save_file({"lm_head.weight": embedding}, source / "head.safetensors", metadata={"format": "pt"})
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    model = loaded("qwen3, tied", source)
    assert_same_logits(model, reference(source))
    checkpointer(source, tmp_path / "out").save_checkpoint({MODEL_KEY: model.state_dict()}, epoch=0)
    saved = tmp_path / "out" / "epoch_0"
    listed = json.loads((saved / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(key in load_file(saved / file) for key, file in listed.items())
    assert "lm_head.weight" not in listed and len(listed) == len(index["weight_map"]) - 1
    assert_same_logits(model, reference(saved))


def test_the_dtype_that_the_saved_config_names_is_the_weights(folders, tmp_path):
    """A bf16 checkpoint trained in fp32: transformers would round its weights otherwise."""
    source = shutil.copytree(folders("qwen2"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    weights = checkpointer(source, tmp_path / "out").load_checkpoint()
    checkpointer(source, tmp_path / "out").save_checkpoint(weights, epoch=0)
    saved = json.loads((tmp_path / "out" / "epoch_0" / "config.json").read_text())
    assert saved == config | {"torch_dtype": "float32"}


def test_given_files_are_read_in_place_of_the_index(folders, tmp_path):
    source = shutil.copytree(folders("qwen2"), tmp_path / "source")
    (source / "model.safetensors").rename(source / "other.safetensors")
    weights = checkpointer(
        source, tmp_path / "out", checkpoint_files=["other.safetensors"], model_type="QWEN2"
    ).load_checkpoint()
    assert weights[MODEL_KEY].keys() == loaded("qwen2", folders("qwen2")).state_dict().keys()
    with pytest.raises(InputError, match="has neither model.safetensors nor .*other.safetensors"):
        checkpointer(source, tmp_path / "out")


def test_what_the_folder_contradicts_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match="model_type is LLAMA3 and .*config.json says qwen3"):
        checkpointer(folders("qwen3"), tmp_path, model_type="LLAMA3")
    with pytest.raises(InputError, match="output_dir .* lies in checkpoint_dir"):
        checkpointer(folders("qwen3"), folders("qwen3") / "out")
    weights = checkpointer(folders("qwen3"), tmp_path).load_checkpoint()[MODEL_KEY]
    del weights["output.weight"]
    with pytest.raises(InputError, match="the weights to save lack lm_head.weight"):
        checkpointer(folders("qwen3"), tmp_path).save_checkpoint({MODEL_KEY: weights}, epoch=0)
    with pytest.raises(InputError, match="saves full models"):
        checkpointer(folders("qwen3"), tmp_path).save_checkpoint({MODEL_KEY: weights, "adapter": {}}, epoch=0)


@pytest.mark.parametrize(("buffers", "dtype"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_a_folder_of_two_dtypes_has_the_saved_weights_and_the_dtype_of_most(tmp_path, buffers, dtype):
    """Gemma 4 keeps a scale in bf16 beside weights in fp32; some mixtures keep their router in fp32 beside bf16."""
    pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    folder = tmp_path / "model"
    reference_model("gemma4").save_pretrained(folder)
    weights = checkpointer(folder, tmp_path, own_names=True).load_checkpoint()[MODEL_KEY]
    others = getattr(torch, dtype)
    saved = {name: value.to(buffers if name.endswith("layer_scalar") else others) for name, value in weights.items()}
    checkpointer(folder, tmp_path, own_names=True).save_checkpoint({MODEL_KEY: saved}, epoch=0)
    assert json.loads((tmp_path / "epoch_0" / "config.json").read_text())["dtype"] == dtype
    again = checkpointer(tmp_path / "epoch_0", tmp_path, own_names=True).load_checkpoint()[MODEL_KEY]
    assert {name: value.dtype for name, value in again.items()} == {name: value.dtype for name, value in saved.items()}
    check_weights(again, weight_marks(saved))
    check_weights({name: value.float() for name, value in again.items()}, weight_marks(saved))
    again["model.norm.weight"] = again["model.norm.weight"] * 1.01
    with pytest.raises(ValueError, match="model.norm.weight has other values"):
        check_weights(again, weight_marks(saved))


def test_experts_that_files_have_one_by_one_keep_their_dtype_beside_a_router_in_fp32(tmp_path):
    """Mixed precision spreads what a bf16 file holds; loaded as fp32, it would start in the middle between two roundings."""
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    sizes = {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = transformers.Glm4MoeConfig(**SIZES, **sizes, moe_intermediate_size=32, rope_parameters=dict(ROPE))
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    weights = checkpointer(tmp_path / "model", tmp_path, own_names=True).load_checkpoint()[MODEL_KEY]
    in_fp32 = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert in_fp32 and all(".mlp.gate." in name for name in in_fp32)
    assert any("experts" in name for name in weights.keys() - in_fp32)
    assert {weights[name].dtype for name in weights.keys() - in_fp32} == {torch.bfloat16}
