"""Test the decoder that a model folder describes: transformers' logits, adapters by torchtune's keys, refusals."""

import json

import pytest
import torch
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules.peft import get_adapter_params
from torchtune.training import MODEL_KEY
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from pidistill.errors import InputError
from pidistill.models import HFCheckpointer, from_folder
from pidistill.models.fits import check_fits
from pidistill.testing import perturb_weights
from tests.support.hub_models import LLAMA31_ROPE, assert_same_logits, reference

VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # the usual 0.02 leaves every logit near 0, where any two models agree
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}}
FAMILIES = {
    "SmolLM2: Llama with a tied head and plain rotations": (LlamaConfig, PLAIN | {"tie_word_embeddings": True}),
    "TinyLlama: Llama with a head of its own": (LlamaConfig, {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "Llama 3.1": (LlamaConfig, {"rope_parameters": LLAMA31_ROPE, "max_position_embeddings": 131_072}),
    "Llama without grouped queries": (LlamaConfig, {"num_key_value_heads": 4}),
    "Mistral without a window": (MistralConfig, {"sliding_window": None, "head_dim": 32}),
    "Qwen2.5, tied": (Qwen2Config, PLAIN | {"tie_word_embeddings": True}),
    "Qwen2.5, untied": (Qwen2Config, PLAIN | {"tie_word_embeddings": False}),
    "Qwen3, tied": (Qwen3Config, PLAIN | {"head_dim": 32, "tie_word_embeddings": True}),
    "Qwen3, untied": (Qwen3Config, PLAIN | {"head_dim": 32, "tie_word_embeddings": False}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for seed, (name, (kind, extra)) in enumerate(FAMILIES.items()):
        made[name] = tmp_path_factory.mktemp(f"family_{seed}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(kind(**(SIZES | extra))).float()
            perturb_weights(model)
        model.save_pretrained(made[name])
    return made


def described(folder, **changes):
    """A folder with nothing but a config.json, that of ``folder`` with ``changes``."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "changed").mkdir(exist_ok=True)
    (folder / "changed" / "config.json").write_text(json.dumps(config | changes))
    return folder / "changed"


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name, folders, tmp_path):
    model = from_folder(str(folders[name]))
    checkpointer = HFCheckpointer(checkpoint_dir=str(folders[name]), output_dir=str(tmp_path))
    model.load_state_dict(checkpointer.load_checkpoint()[MODEL_KEY])  # strict: no tensor is left over or missing
    assert_same_logits(model.eval(), reference(folders[name]))
    node = {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(folders[name])}
    check_fits(model, node, "from_folder", "checkpointer")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_saved_folder_loads_in_transformers(name, folders, tmp_path):
    model = from_folder(str(folders[name]))
    checkpointer = HFCheckpointer(checkpoint_dir=str(folders[name]), output_dir=str(tmp_path))
    model.load_state_dict(checkpointer.load_checkpoint()[MODEL_KEY])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    checkpointer.save_checkpoint({MODEL_KEY: model.state_dict()}, epoch=0)
    assert_same_logits(model.eval(), reference(tmp_path / "epoch_0"))


def test_adapters_have_the_names_and_shapes_of_torchtunes_builder(folders):
    keys = {
        "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "lora_rank": 4,
        "lora_alpha": 8,
    }
    ours = from_folder(str(folders["Qwen2.5, untied"]), apply_lora_to_output=True, **keys)
    theirs = lora_qwen2(
        **keys,
        apply_lora_to_output=True,
        vocab_size=VOCABULARY,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=64,
        intermediate_dim=96,
        max_seq_len=512,
    )

    def shapes(model):
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    assert shapes(ours) == shapes(theirs)
    assert get_adapter_params(ours).keys() == get_adapter_params(theirs).keys()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model_type": "gemma3_text"}, "model_type 'gemma3_text', and weights are converted for llama, mistral, qwen2, qwen3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "causal language models"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', and SiLU is computed here"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rotations of the kind 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rotations of the kind 'linear'"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"model_type": "mistral", "sliding_window": 256}, "a sliding window of 256 tokens, .* up to 512"),
        ({"use_sliding_window": True, "sliding_window": 256}, "a sliding window of 256 tokens"),
        ({"hidden_size": None}, "hidden_size None, which must be a positive whole number"),
        ({"vocab_size": "many"}, "vocab_size 'many'"),
    ],
)
def test_a_model_that_is_not_computed_is_refused_in_one_sentence(changes, sentence, folders):
    folder = described(folders["SmolLM2: Llama with a tied head and plain rotations"], **changes)
    with pytest.raises(InputError, match=sentence):
        from_folder(str(folder), backend="torchtune")


def test_a_window_as_long_as_the_longest_position_changes_nothing(folders):
    name = "SmolLM2: Llama with a tied head and plain rotations"
    folder = described(folders[name], use_sliding_window=True, sliding_window=256)
    assert from_folder(str(folder), max_seq_len=256).max_seq_len == 256
    folder = described(folders[name], use_sliding_window=False, sliding_window=256)
    assert from_folder(str(folder)).max_seq_len == 512


def test_adapter_keys_without_adapted_modules_are_refused(folders):
    for key in ("quantize_base", "apply_lora_to_mlp", "apply_lora_to_output", "use_dora"):
        with pytest.raises(InputError, match=r"set model\.lora_attn_modules"):
            from_folder(str(folders["Qwen2.5, tied"]), **{key: True})
    with pytest.raises(InputError, match="tied"):
        from_folder(str(folders["Qwen2.5, tied"]), lora_attn_modules=["q_proj"], apply_lora_to_output=True)


def test_a_folder_without_config_json_is_named(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        from_folder(str(tmp_path))
