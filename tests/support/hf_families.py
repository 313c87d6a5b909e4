"""Make tiny random models of transformers' families, with norms, biases and sinks moved away from their start."""

import copy
from typing import Any

import torch

VOCABULARY = 50
WINDOW = 6  # sliding windows are shorter than the sequences
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # the usual 0.02 leaves every logit near 0, where any two models agree
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HALF = ["sliding_attention", "full_attention"] * 2
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": HALF,
    "tie_word_embeddings": True,
}
WINDOWED = {"sliding_window": WINDOW, "layer_types": HALF, "tie_word_embeddings": False, "rope_parameters": ROPE}

# name → (class of the config in transformers, its values beside SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied (SmolLM2)": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": ROPE}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": ROPE}),
    "mistral, window": (
        "MistralConfig",
        {"sliding_window": WINDOW, "tie_word_embeddings": False, "rope_parameters": ROPE},
    ),
    "ministral3": (
        "Ministral3Config",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16},
        },
    ),
    "phi3": ("Phi3Config", {"tie_word_embeddings": False, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}),
    "smollm3, layers without rotations": (
        "SmolLM3Config",
        {"tie_word_embeddings": True, "rope_parameters": ROPE, "no_rope_layer_interval": 2},
    ),
    "olmo3, window": ("Olmo3Config", WINDOWED),
    "granite, scaled logits": (
        "GraniteConfig",
        {
            "tie_word_embeddings": True,
            "rope_parameters": ROPE,
            "logits_scaling": 4.0,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 2.0,
        },
    ),
    "gemma2, caps": (
        "Gemma2Config",
        GEMMA | {"rope_parameters": ROPE, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA | {"rope_parameters": {"full_attention": ROPE | {"rope_theta": 1e6}, "sliding_attention": ROPE}},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": HALF,
            "tie_word_embeddings": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 2,
            "final_logit_softcapping": 5.0,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
            "rope_parameters": ROPE,
        },
    ),
    "gpt_oss, sinks and window": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2} | WINDOWED,
    ),
    "qwen3_5, hybrid": (
        "Qwen3_5TextConfig",
        {
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "tie_word_embeddings": True,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]},
        },
    ),
}
# Others that carry states, for the scorer and the sampler alone.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2, convolutions": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2, "rope_parameters": ROPE}),
    "bamba": ("BambaConfig", MAMBA | {"attn_layer_indices": [1, 3], "rope_parameters": ROPE, "tie_word_embeddings": False}),
    "falcon_h1, both in one layer": ("FalconH1Config", MAMBA | {"mamba_d_ssm": 128, "rope_parameters": ROPE, "head_dim": 16}),
    "qwen3_next": (
        "Qwen3NextConfig",
        FAMILIES["qwen3_moe"][1] | FAMILIES["qwen3_5, hybrid"][1] | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    ),
}
HYBRIDS = {"qwen3_5, hybrid", *STATEFUL}


def make_config(name: str, **changes: Any) -> Any:
    import transformers

    kind, values = (FAMILIES | STATEFUL)[name]
    return getattr(transformers, kind)(**copy.deepcopy(SIZES | values | changes))  # a config may write into what it is given


def reference_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """Return transformers' own model in fp32, with its plain (eager) attention."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(name, **changes), attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim == 1 and not parameter_name.endswith("A_log"):
                    around_zero = parameter_name.endswith(("bias", "sinks"))
                    parameter.uniform_(-0.5, 0.5).add_(0.0 if around_zero else 1.0)
                elif parameter_name.endswith("proj_bias"):
                    parameter.uniform_(-0.5, 0.5)
    return model


def decoder_of(model: Any) -> Any:
    """Return the decoder with the weights of a model of transformers, which keeps its own."""
    from transformers import AutoModelForCausalLM

    from pidistill.models.hf_decoder import NAME, HFDecoder

    config = copy.deepcopy(model.config)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.float32)
    twin.load_state_dict(model.state_dict())
    return HFDecoder(twin)
