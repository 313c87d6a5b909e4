"""Refuse, before weights are loaded, a transformers model that the scorer, trees or sampler would compute wrongly."""

import math
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pidistill.errors import InputError

# Layers whose tokens meet only in the attention, if at all. Every other kind carries a state from token to token.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"}
_WITH_STATE = {"linear_attention", "conv", "hybrid"}


def own_masks_sentence(kind: str) -> str:
    """Return the refusal of a model whose attention cannot be reached."""
    return (
        f"{kind} of transformers does not take its attention and its masks from transformers' attention interface, so that "
        "packed trees and the sampler's caches cannot reach it; choose another model"
    )


def check_kind(lm: PreTrainedModel, path: str) -> None:
    """Refuse a model that is not a causal language model of text, or whose layers compute what cannot be reached here."""
    if lm.config.is_encoder_decoder:
        raise InputError(f"the model in {path} is an encoder with a decoder, and only decoders can be trained; choose another")
    if hasattr(lm.config, "vision_config") or hasattr(lm.config, "audio_config"):
        raise InputError(
            f"the model in {path} ({type(lm).__name__}) takes images or sounds beside text, which are not trained here; "
            "choose a folder with the text model alone"
        )
    if not _uses_interface(lm) or not isinstance(getattr(lm.base_model, "layers", None), nn.ModuleList):
        raise InputError(f"the model in {path} cannot be trained here: {own_masks_sentence(type(lm).__name__)}")
    if any(getattr(module, "is_causal", True) is False for module in lm.modules()):
        raise InputError(
            f"the model in {path} lets a token see those after it (use_bidirectional_attention in its config.json), so that it "
            "cannot be sampled; choose another model"
        )
    if strange := set(getattr(lm.config.get_text_config(), "layer_types", None) or ()) - ATTENTION - _WITH_STATE:
        raise InputError(
            f"the model in {path} has layers of the kind {', '.join(sorted(strange))}, which are not sampled here; choose "
            "another model"
        )
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise InputError(f"the model in {path} has an output head with a bias, which is not scored here; choose another model")


def check_states(lm: PreTrainedModel, path: str) -> None:
    """Refuse layers whose numbers depend on how many tokens they read at once, because sampler and scorer differ in that."""
    if "mamba_selective_scan" in vars(sys.modules[type(lm).__module__]):
        raise InputError(
            f"the layers of the model in {path} ({type(lm).__name__} of transformers) forget their state where they read "
            "several tokens at once, so that a second turn would be sampled wrongly; choose another model"
        )
    limits = {tuple(m.time_step_limit) for m in lm.modules() if getattr(m, "time_step_limit", None) is not None}
    if limits - {(0.0, math.inf)}:
        raise InputError(
            f"the layers of the model in {path} ({type(lm).__name__} of transformers) keep their time steps within "
            f"{sorted(limits)} where they read a row and not where they read one token, so that it would sample from another "
            "distribution than it is scored with; choose another model"
        )


def _uses_interface(lm: PreTrainedModel) -> bool:
    """Return whether the model's code asks transformers' registries for its attention and for its masks."""
    names = vars(sys.modules[type(lm).__module__])
    return "ALL_ATTENTION_FUNCTIONS" in names and any(n.startswith("create_") and n.endswith("causal_mask") for n in names)


def check_rotations(config: Any, path: str, max_seq_len: int | None) -> None:
    """Refuse rotations that depend on the longest row of a batch: the scorer would score another policy than the sampler's."""
    text = config.get_text_config()
    longest = max_seq_len or getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        raise InputError(
            f"{path}/config.json has no max_position_embeddings; set model.max_seq_len to the longest row in tokens"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    for one in [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, Mapping)]:
        first = one.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        first = first if isinstance(first, int) and first > 0 else longest
        if one.get("rope_type") in ("dynamic", "longrope") and longest > first:
            raise InputError(
                f"the model in {path} has rotations of the kind {one['rope_type']!r}, which change with the length of a batch "
                f"beyond {first:,} tokens; set model.max_seq_len={first}"
            )
