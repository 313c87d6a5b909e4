"""Check what the config.json of a model folder says: its sizes, and whether the model is one that is computed here."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pidistill.errors import InputError

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_LARGEST = 10**9  # no size of a model comes near it
_MOST_LAYERS = 10_000  # more would be built for hours before a weight is missed


def check_sizes(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a config.json whose sizes or rotations are absent or not numbers."""
    for key in _SIZES:
        _check(config, key, folder, _is_size(config.get(key)), "a positive whole number")
    _check_layers(config, folder)
    for key in ("num_key_value_heads", "head_dim"):
        _check(config, key, folder, config.get(key) is None or _is_size(config[key]), "a positive whole number or null")
    if config.get("head_dim") is None and config["hidden_size"] % config["num_attention_heads"]:
        raise InputError(
            f"{folder / 'config.json'} has hidden_size {config['hidden_size']}, which {config['num_attention_heads']} heads do "
            "not share evenly; copy or download the folder again"
        )
    for key in ("rope_parameters", "rope_scaling", "quantization_config"):
        _check(config, key, folder, isinstance(config.get(key) or {}, Mapping | str), "an object or null")
    rope = rotations(config)
    for key, value in {"rope_theta": rope.get("rope_theta", config.get("rope_theta", 1.0)), **_scaling(rope)}.items():
        _check({key: value}, key, folder, _is_number(value) and value > 0, "a positive number")
    _check(config, "rms_norm_eps", folder, _is_number(config.get("rms_norm_eps", 1e-6)), "a number")


def check_plain_sizes(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse numbers that cannot be sizes; a list, where layers differ, is accepted."""
    for key in (*_SIZES, "num_key_value_heads", "head_dim"):
        value = config.get(key)
        _check(config, key, folder, not isinstance(value, int | float) or _is_size(value), "a positive whole number")
    _check_layers(config, folder)


def _check_layers(config: Mapping[str, Any], folder: Path) -> None:
    number = config.get("num_hidden_layers")
    _check(config, "num_hidden_layers", folder, number is None or number <= _MOST_LAYERS, f"at most {_MOST_LAYERS:,}")


def rotations(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the rotations, from either of the layouts that transformers has had for them."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found if isinstance(found, Mapping) else {}


def rotation_kind(rope: Mapping[str, Any]) -> str:
    """Return the kind of the rotations: default, llama3, or another of transformers' names."""
    return str(rope.get("rope_type", rope.get("type", "default")) or "default")


def not_computed(config: Mapping[str, Any], longest: int) -> str | None:
    """Return what in a config.json changes the model's numbers and is not computed here, and what is; None for nothing.

    Args:
        longest: the longest position that the model is used with; an attention window of at least this changes nothing.
    """
    kind = rotation_kind(rotations(config))
    part = rotations(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    window, windowed = config.get("sliding_window"), config.get("use_sliding_window", config.get("model_type") == "mistral")
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        return f"hidden_act {activation!r}, and SiLU is computed here"
    if kind not in ("default", "llama3"):
        return f"rotations of the kind {kind!r}, and the kinds default and llama3 are computed here"
    if part not in (None, 1, 1.0):
        return f"partial_rotary_factor {part}, and whole heads are rotated here"
    if biased := next((key for key in ("attention_bias", "mlp_bias") if config.get(key)), None):
        return f"{biased} true, and these layers have no bias here"
    if windowed and isinstance(window, int) and window < longest:
        return (
            f"a sliding window of {window:,} tokens, and every token sees all earlier ones here, up to {longest:,}; with "
            f"model.max_seq_len={window} the two are the same"
        )
    return None


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    if rotation_kind(rope) != "llama3":
        return {}
    return {key: rope.get(key) for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST


def _check(config: Mapping[str, Any], key: str, folder: Path, right: bool, wanted: str) -> None:
    if not right:
        value = repr(config.get(key))
        shown = value if len(value) <= 80 else f"{value[:77]}..."
        raise InputError(
            f"{folder / 'config.json'} has {key} {shown}, which must be {wanted}; copy or download the folder again"
        )
