"""Test the mapping between Hugging Face's weight layout and torchtune's, in memory."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from pidistill.errors import InputError
from pidistill.models import from_hf, to_hf

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 12,  # two digits in a layer's number
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
CONFIGS = {
    "llama": (LlamaConfig, {}),
    "llama, own head_dim": (LlamaConfig, {"head_dim": 32}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
}


def hf_weights(name, tied):
    kind, extra = CONFIGS[name]
    config = kind(**SIZES, **extra, tie_word_embeddings=tied)
    with torch.device("cpu"), torch.random.fork_rng():
        return AutoModelForCausalLM.from_config(config).state_dict(), config.to_dict()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_to_hf_is_the_inverse_of_from_hf(name, tied):
    weights, config = hf_weights(name, tied)
    assert "lm_head.weight" in weights  # transformers lists a tied head too, as some files on the Hub do
    ours = from_hf(weights, config)
    assert ("output.weight" in ours) is not tied
    assert len(ours) == len(weights) - tied
    back = to_hf(ours, config)
    expected = {key: value for key, value in weights.items() if not (tied and key == "lm_head.weight")}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in back)


def test_llama_rows_are_permuted_and_qwen_rows_are_not():
    """torchtune's row 1 of a head is Hugging Face's row head_dim / 2, in heads of the width that the config gives."""
    for name, partner in (("llama", 8), ("llama, own head_dim", 16), ("qwen2", 1), ("qwen3", 1)):
        weights, config = hf_weights(name, False)
        ours = from_hf(weights, config)["layers.0.attn.q_proj.weight"]
        assert torch.equal(ours[1], weights["model.layers.0.self_attn.q_proj.weight"][partner]), name


def test_unknown_family_names_the_known_ones():
    with pytest.raises(InputError, match="model_type 'gemma2', and weights are converted for llama, mistral, qwen2, qwen3"):
        from_hf({}, {"model_type": "gemma2"})


def test_a_classifier_is_no_language_model():
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"]}
    with pytest.raises(InputError, match="Qwen2ForSequenceClassification, and the known ones are .*Qwen2ForCausalLM"):
        from_hf({}, config)


def test_tensor_without_a_place_is_named():
    weights, config = hf_weights("llama", False)
    weights["model.layers.3.self_attn.q_norm.weight"] = torch.ones(16)
    with pytest.raises(InputError, match=r"do not fit a llama model .*model\.layers\.3\.self_attn\.q_norm\.weight"):
        from_hf(weights, config)


def test_a_head_that_the_config_ties_away_is_not_dropped():
    weights, config = hf_weights("qwen3", False)
    with pytest.raises(InputError, match="tie_word_embeddings"):
        to_hf(from_hf(weights, config), config | {"tie_word_embeddings": True})
