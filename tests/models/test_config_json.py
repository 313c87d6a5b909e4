"""Test that a wrong entry of config.json is named, and so is the part of a model that is not computed here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pidistill.errors import InputError
from pidistill.models.fits import check_fits
from tests.support.hub_models import empty, hub_folder

NODE = {"_component_": "pidistill.models.HFCheckpointer"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make one folder for each family that a test asks for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = hub_folder(name, tmp_path_factory.mktemp("hub") / "model")
        return made[name]

    return folder


def check(name: str, source: Path, place: Path, tensors=None, **config) -> None:
    """Compare a copy of ``source``, with other entries in its config.json and more tensors, with the builder ``name``."""
    (place / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    save_file(load_file(source / "model.safetensors") | (tensors or {}), place / "model.safetensors")
    with torch.device("meta"):
        model = empty(name)
    check_fits(model, NODE | {"checkpoint_dir": str(place)}, builder="the.builder", key="checkpointer")


NOT_COMPUTED = {
    "activation": ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act 'gelu_pytorch_tanh', and SiLU is computed here"),
    "window": (
        {"use_sliding_window": True, "sliding_window": 128},
        "a sliding window of 128 tokens, .* up to 256; with model.max_seq_len=128 the two are the same",
    ),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotations of the kind 'yarn'"),
    "dynamic, old layout": ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rotations of the kind 'dynamic'"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, and whole heads are rotated here"),
    "bias of attention": ({"attention_bias": True}, "attention_bias true, and these layers have no bias here"),
    "bias of the MLP": ({"mlp_bias": True}, "mlp_bias true"),
    "another head": ({"tie_word_embeddings": True}, "says tie_word_embeddings=True, and the.builder has tie_word_embeddings=F"),
}


@pytest.mark.parametrize("case", NOT_COMPUTED)
def test_a_model_that_is_not_computed_here_is_refused_with_what_is_not_computed(case, folders, tmp_path):
    config, message = NOT_COMPUTED[case]
    with pytest.raises(InputError, match=message):
        check("qwen3", folders("qwen3"), tmp_path, **config)


COMPUTED = {
    "the same activation by another name": {"hidden_act": "swish"},
    "a window that is not used": {"use_sliding_window": False, "sliding_window": 128},
    "a window as long as the longest position": {"use_sliding_window": True, "sliding_window": 256},
    "whole heads": {"partial_rotary_factor": 1.0},
    "no bias, said": {"attention_bias": False, "mlp_bias": None},
    "code of the Hub, which is not run": {"auto_map": {"AutoModel": "modeling.Evil"}, "trust_remote_code": True},
}


@pytest.mark.parametrize("case", COMPUTED)
def test_a_model_that_is_computed_here_is_accepted(case, folders, tmp_path):
    check("qwen3", folders("qwen3"), tmp_path, **COMPUTED[case])


QUANTISED = {
    "int8 weights": ("model.layers.0.mlp.up_proj.weight", torch.zeros(128, 64, dtype=torch.int8), "I8"),
    "int8 scales": ("model.layers.0.mlp.up_proj.weight_scale", torch.ones(128, 1), "F32"),
    "bitsandbytes, 8 bits": ("model.layers.0.mlp.up_proj.SCB", torch.ones(128), "F32"),
    "bitsandbytes, 4 bits": ("model.layers.0.mlp.up_proj.weight.absmax", torch.ones(128), "F32"),
    "GPTQ": ("model.layers.0.mlp.up_proj.qweight", torch.zeros(8, 8, dtype=torch.int32), "I32"),
    "FP8": ("model.layers.0.mlp.up_proj.weight", torch.zeros(128, 64).to(torch.float8_e4m3fn), "F8_E4M3"),
    "FP8 scales": ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1), "F32"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_called_quantised_without_a_word_in_config_json(kind, folders, tmp_path):
    name, tensor, shown = QUANTISED[kind]
    with pytest.raises(
        InputError, match=rf"are quantised \({name} is of type {shown}\).*set checkpoint_dir to the unquantised"
    ):
        check("qwen3", folders("qwen3"), tmp_path, {name: tensor})


def test_a_bias_that_only_the_files_have_is_named(folders, tmp_path):
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    with pytest.raises(
        InputError, match=r"has tensor model.layers.0.self_attn.q_proj.bias .*which has no place in the.builder"
    ):
        check("llama3", folders("llama3"), tmp_path, bias)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "64", 1.5, True, [64], 10**18])
def test_a_size_that_is_not_a_positive_whole_number_is_named_with_its_value(key, value, folders, tmp_path):
    with pytest.raises(InputError, match=rf"config.json has {key} .*, which must be a positive whole number"):
        check("qwen3", folders("qwen3"), tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_dim": None, "num_attention_heads": 7}, "has hidden_size 64, which 7 heads do not share evenly"),
        ({"head_dim": "16"}, "has head_dim '16', which must be a positive whole number or null"),
        ({"rope_parameters": [1]}, r"has rope_parameters \[1\], which must be an object or null"),
        ({"rope_parameters": {"rope_theta": "x"}}, "has rope_theta 'x', which must be a positive number"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "has factor None, which must be a positive number"),
        ({"rms_norm_eps": "small"}, "has rms_norm_eps 'small', which must be a number"),
        ({"architectures": 7}, "has architectures 7, and the known ones are causal language models"),
    ],
)
def test_an_entry_that_no_model_has_is_named(values, message, folders, tmp_path):
    with pytest.raises(InputError, match=message):
        check("qwen3", folders("qwen3"), tmp_path, **values)
