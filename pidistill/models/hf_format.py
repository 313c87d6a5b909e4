"""Convert weights between Hugging Face's layout and torchtune's, in memory; config.json says which family they are of.

Llama's and Mistral's query and key rows are permuted (torchtune rotates neighbouring pairs, Hugging Face halves); Qwen's keep
their order.
Qwen3 is Qwen2 without biases and with two norms more in every layer.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torchtune.models.convert_weights import hf_to_tune, tune_to_hf
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune, qwen2_tune_to_hf

from pidistill.errors import InputError, one_line

State = dict[str, Tensor]
Config = Mapping[str, Any]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LIKE_LLAMA = ("llama", "mistral")  # query and key rows are permuted
TIED_HEAD = "lm_head.weight"  # some tied checkpoints hold it beside the embedding that it equals
_NORMS = {"self_attn.q_norm.weight": "attn.q_norm.scale", "self_attn.k_norm.weight": "attn.k_norm.scale"}


def family(config: Config) -> str:
    """Return the config's ``model_type``."""
    name, architectures = config.get("model_type"), config.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    if name not in FAMILIES:
        raise InputError(
            f"config.json has model_type {name!r}, and weights are converted for {', '.join(FAMILIES)}; for a family that "
            "torchtune has, set checkpointer._component_ to torchtune.training.FullModelHFCheckpointer with its model_type"
        )
    if architectures and not any(str(architecture).endswith("ForCausalLM") for architecture in architectures):
        raise InputError(
            f"config.json has architectures {', '.join(map(str, architectures))}, and the known ones are causal language models"
            f" ({', '.join(n.capitalize() + 'ForCausalLM' for n in FAMILIES)}); check checkpointer.checkpoint_dir"
        )
    return name


def head_dim(config: Config) -> int:
    """Return the width of one attention head: the one that is given (Qwen3's is not hidden_size / heads), or the quotient."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def is_tied(config: Config) -> bool:
    """Return True if the output head is the embedding."""
    return bool(config.get("tie_word_embeddings", False))


def not_loaded(names: Iterable[str], config: Config) -> set[str]:
    """Return those of a folder's tensors that no model has: a tied head's copy, the rotations' frequencies in old exports."""
    return {name for name in names if name.endswith("rotary_emb.inv_freq") or (name == TIED_HEAD and is_tied(config))}


def from_hf(state: State, config: Config) -> State:
    """Convert Hugging Face's names and row order to torchtune's; tensors that need no permutation are not copied."""
    name = family(config)
    if is_tied(config):
        state = {key: value for key, value in state.items() if key != TIED_HEAD}
    if name in LIKE_LLAMA:
        return _converted(hf_to_tune, state, config)
    if name == "qwen2":
        return _converted(qwen2_hf_to_tune, state, config)
    norms = _renamed(state, _NORMS, "model.layers.", "layers.")
    rest = {key: value for key, value in state.items() if not key.endswith(tuple(_NORMS))}
    return _converted(qwen2_hf_to_tune, rest, config) | norms


def to_hf(state: State, config: Config) -> State:
    """Invert :func:`from_hf`. A tied model's state has no output head, and none is made.

    ``state`` is a model's own state dict (``gather_cpu_state_dict`` of a sharded one), without LoRA adapters.
    """
    name = family(config)
    if is_tied(config) and "output.weight" in state:
        raise InputError(
            "config.json ties the output head to the embedding (tie_word_embeddings) and the model has a head of its own, "
            "which would be lost; set `model` to the tied builder of this size, or checkpointer.checkpoint_dir to an untied one"
        )
    if name in LIKE_LLAMA:
        return _converted(tune_to_hf, state, config)
    if name == "qwen2":
        return _converted(qwen2_tune_to_hf, state, config)
    back = {ours: theirs for theirs, ours in _NORMS.items()}
    norms = _renamed(state, back, "layers.", "model.layers.")
    rest = {key: value for key, value in state.items() if not key.endswith(tuple(back))}
    return _converted(qwen2_tune_to_hf, rest, config) | norms


def _converted(convert: Callable[..., State], state: State, config: Config) -> State:
    sizes = {
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "dim": config["hidden_size"],
        "head_dim": head_dim(config),
    }
    try:
        return convert(state, **sizes)
    except Exception as error:
        # torchtune raises a bare Exception for an unknown name, and torch a RuntimeError for a shape.
        name, detail = config["model_type"], one_line(error)
        raise InputError(
            f"these weights do not fit a {name} model of config.json's sizes ({detail}); check checkpoint_dir and `model`"
        ) from error


def _renamed(state: State, names: Mapping[str, str], prefix: str, new_prefix: str) -> State:
    found = {}
    for key, value in state.items():
        for old, new in names.items():
            if key.endswith(old):
                found[new_prefix + key.removeprefix(prefix).removesuffix(old) + new] = value
    return found
