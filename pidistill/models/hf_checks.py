"""Refuse, before weights are loaded, a transformers model that the scorer, trees or sampler would compute wrongly."""

import math
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from pidistill.errors import InputError, one_line
from pidistill.models.layer_masks import LayerMask, PaddedMask, Rule
from pidistill.models.layer_states import States
from pidistill.models.modules import replaced
from pidistill.models.protocol import carried_state

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


# ---------------------------------------------------------------------------------------------- a trial of the code


def check_forward(decoder: nn.Module, path: str) -> None:
    """Refuse a model whose code fails with the masks and states that stand here for transformers' masks and cache.

    Its forwards are tried on the meta device, where nothing is computed or drawn: first with the layers up to the first of each
    kind, which takes well under a second, then with all of them, because a model's code may need all.
    """
    error = None
    for layers in (_first_of_each_kind(decoder), decoder.layers):
        with replaced(decoder.body, "layers", layers):
            error = _try_forwards(decoder)
        if error is None:
            return
    if isinstance(error, InputError):
        raise InputError(f"the model in {path} cannot be trained here: {error}") from error
    raise InputError(
        f"the model in {path} cannot be trained here: {decoder.causal_lm.__name__} of transformers does not take the masks and "
        f"states that packed trees and the sampler hand to its layers ({one_line(error, 300)}); choose another model"
    ) from error


def _first_of_each_kind(decoder: nn.Module) -> nn.ModuleList:
    """Return the layers up to where every kind has been met: a layer's class, and what the config says of it."""
    said = getattr(decoder.config.get_text_config(), "layer_types", None) or ()
    kinds = [(type(layer), *said[i : i + 1]) for i, layer in enumerate(decoder.layers)]
    return decoder.layers[: max(kinds.index(kind) for kind in set(kinds)) + 1]


def _try_forwards(decoder: nn.Module) -> Exception | None:
    """Return the error of a forward as the scorer makes it, or else of the sampler's: two tokens, then one more."""
    tensors = _on_meta(decoder)
    return _error_of(lambda: _score(decoder, tensors)) or _error_of(lambda: _sample(decoder, tensors))


def _error_of(read: Callable[[], None]) -> Exception | None:
    """Return what a forward on the meta device raises, if that says anything about the model.

    A RuntimeError does not: torch raises it for what the meta device does not know, such as counting a tensor's elements.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            read()
    except RuntimeError:
        return None
    except Exception as error:  # a family's code may fail with any
        return error
    return None


def _on_meta(decoder: nn.Module) -> dict[str, Tensor]:
    """Return tensors of the meta device for all weights and buffers; it knows the products of experts only in bf16."""
    tensors = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    narrow = {torch.float32: torch.bfloat16} if decoder.experts else {}
    return {name: torch.empty_like(x, device="meta", dtype=narrow.get(x.dtype, x.dtype)) for name, x in tensors.items()}


def _score(decoder: nn.Module, tensors: dict[str, Tensor]) -> None:
    _read(decoder, tensors, 0, 2, None)


def _sample(decoder: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Read as the sampler does; without states its masks are of the same kind as the scorer's."""
    if carried_state(decoder):
        states, slots = States(), torch.zeros(1, dtype=torch.long)
        states.reserve(1)
        with states.of(SimpleNamespace(slots=slots, copies=(slots, slots))):
            _read(decoder, tensors, 0, 2, states)
        with states.of(SimpleNamespace(slots=slots, copies=None)):
            _read(decoder, tensors, 2, 1, states)


def _read(decoder: nn.Module, tensors: dict[str, Tensor], start: int, length: int, states: States | None) -> None:
    """Read ``length`` tokens from the place ``start`` on, with ``tensors`` in the place of the decoder's own."""
    ids = torch.zeros(1, length, dtype=torch.long)
    positions = torch.arange(start, start + length)[None]
    torch.func.functional_call(decoder, tensors, (ids,), {"mask": _TriedMasks(states), "input_pos": positions})


class _TriedMasks:
    """Make the masks of a forward that is only tried: no layer keeps keys and values."""

    def __init__(self, states: States | None) -> None:
        self.states = states

    def layer_mask(self, rule: Rule, positions: Int[Tensor, "1 n"]) -> LayerMask:
        return PaddedMask(rule, positions.shape[1], positions.device)
