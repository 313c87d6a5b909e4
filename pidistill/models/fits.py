"""Refuse a checkpoint folder of another model than the config builds, before any weight is loaded.

The answer comes from config.json and from the tensors' names, shapes and types: another size, another family, other rotations,
or something that is not computed here.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torchtune.modules import FeedForward, MultiHeadAttention, TiedLinear, TransformerDecoder

from pidistill.errors import InputError
from pidistill.models.config_json import check_sizes, not_computed, rotation_kind, rotations
from pidistill.models.from_folder import LLAMA3_SCALING, check_folder
from pidistill.models.hf_folder import QUANTIZED, Stored, read_json, stored_tensors, weight_files
from pidistill.models.hf_format import FAMILIES, LIKE_LLAMA, family, head_dim, is_tied, not_loaded, to_hf
from pidistill.models.protocol import has_own_names

log = logging.getLogger(__name__)

_ADAPTER = ("lora_a.weight", "lora_b.weight", "magnitude")
_OTHER_FOLDER = "the folder is incomplete, or of another model: check checkpoint_dir and `model`"
# What is compared of a transformers model, whose config and the folder's have the same keys.
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")


def check_fits(model: nn.Module, checkpointer: Mapping[str, Any], builder: str, key: str) -> None:
    """Refuse the folder of a config's ``checkpointer`` node if it is not ``model``'s; see the two functions below.

    Nothing is checked where this cannot tell: a family that only torchtune's checkpointer converts, a model of other modules.
    """
    folder = Path(checkpointer["checkpoint_dir"])
    config = read_json(folder / "config.json")
    torchtunes = not str(checkpointer["_component_"]).endswith(".HFCheckpointer")
    if has_own_names(model):
        if torchtunes:
            raise InputError(
                f"{key}._component_={checkpointer['_component_']} reads torchtune's families, and `model` is one of "
                f"transformers; set {key}._component_=pidistill.models.HFCheckpointer"
            )
        check_folder(config, str(folder))
        text = (
            config["text_config"] if isinstance(config.get("text_config"), Mapping) else config
        )  # of a folder with images too
        ours = {name: value for name, value in model.config.to_dict().items() if name in _SIZES}
        _check_facts(ours, text, folder, builder, "set model.path to ${checkpointer.checkpoint_dir}")
        check_module_names_fit(model, folder, builder)
        return
    if config.get("model_type") not in FAMILIES:
        if not torchtunes:
            family(config)  # refuses it
        return
    if not isinstance(model, TransformerDecoder) or not isinstance(getattr(model.layers[0], "mlp", None), FeedForward):
        return
    if not isinstance(model.layers[0].attn, MultiHeadAttention):
        return
    check_config_fits(model, config, folder, builder, key)
    files = list(checkpointer.get("checkpoint_files") or weight_files(folder))
    if all(name.endswith(".safetensors") for name in files):
        check_tensors_fit(model, config, stored_tensors(folder, files), folder, builder)


def check_config_fits(model: TransformerDecoder, config: Mapping[str, Any], folder: Path, builder: str, key: str) -> None:
    """Refuse a config.json of another architecture than ``model``, which may stand on the meta device.

    Args:
        builder: what ``model`` was built by, as the config names it.
        key: the config key of the checkpointer.
    """
    check_folder(config, str(folder))
    check_sizes(config, folder)
    node = "teacher_model" if key == "teacher_checkpointer" else "model"
    if reason := not_computed(config, model.max_seq_len):
        raise InputError(
            f"the model in {folder} has {reason}; set `{node}` to a builder that computes it, or {key}.checkpoint_dir to "
            "another model"
        )
    advice = f"set `{node}` to the builder and arguments of that checkpoint, or {key}.checkpoint_dir to another one"
    _check_facts(model_facts(model), config_facts(config), folder, builder, advice)
    eps = config.get("rms_norm_eps")
    if eps is not None and not math.isclose(eps, model.norm.eps, rel_tol=1e-6):  # files hold it as rounded to fp32
        log.warning(f"{folder}/config.json says rms_norm_eps={eps}, and {builder} has {model.norm.eps}")


def _check_facts(ours: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path, builder: str, advice: str) -> None:
    """Refuse a folder that differs in a fact that is known of both."""
    other = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    if other:
        said, built = (", ".join(f"{name}={_shown(facts[name])}" for name in other) for facts in (theirs, ours))
        raise InputError(
            f"the checkpoint in {folder} is another model than {builder} builds: its config.json says {said}, and {builder} "
            f"has {built}; {advice}"
        )


def model_facts(model: TransformerDecoder) -> dict[str, Any]:
    """Return what a torchtune decoder is, in config.json's words; rotations only of the kinds that are known here."""
    attention = model.layers[0].attn
    rope = getattr(attention, "pos_embeddings", None)
    facts = {
        "model_type": _family_of(attention),
        "hidden_size": model.tok_embeddings.embedding_dim,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": model.layers[0].mlp.w1.weight.shape[0],
        "vocab_size": model.tok_embeddings.num_embeddings,
        "tie_word_embeddings": isinstance(model.output, TiedLinear),
    }
    if hasattr(rope, "base"):
        scaled = getattr(rope, "scale_factor", 1) != 1  # a factor of 1 leaves every rotation as it is
        facts["rope_theta"] = float(rope.base)
        facts["rope_scaling"] = {name: float(getattr(rope, own)) for name, own in LLAMA3_SCALING.items()} if scaled else None
    return facts


def config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same of a config.json, in either of the layouts that transformers has had for rotations."""
    rope = rotations(config)
    kind = rotation_kind(rope)
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    scaling: Any = None if kind == "default" else str(kind)
    if kind == "llama3":
        scaling = {name: float(rope[name]) for name in LLAMA3_SCALING}
    name = family(config)
    return {
        "model_type": "llama" if name in LIKE_LLAMA else name,
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": head_dim(config),
        "intermediate_size": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "tie_word_embeddings": is_tied(config),
        "rope_theta": float(theta),
        "rope_scaling": scaling,
    }


def check_tensors_fit(
    model: TransformerDecoder, config: Mapping[str, Any], stored: Mapping[str, Stored], folder: Path, builder: str
) -> None:
    """Refuse a folder that lacks a tensor of ``model``, has one more, or one of another shape; adapters are not looked for."""
    base = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_ADAPTER)}
    wanted = {name: tuple(tensor.shape) for name, tensor in to_hf(base, dict(config)).items()}
    needless = not_loaded(stored, config)
    found = {name: tensor for name, tensor in stored.items() if name not in needless}
    _check_stored(wanted, found, folder, builder)
    if unexpected := sorted(found.keys() - wanted.keys()):
        at = f"{_first(unexpected)} ({found[unexpected[0]].file})"
        raise InputError(f"checkpoint folder {folder} has tensor {at}, which has no place in {builder}; {_OTHER_FOLDER}")


def check_module_names_fit(model: nn.Module, folder: Path, builder: str) -> None:
    """Refuse a folder of another model than ``model``, whose modules are transformers', by the names and shapes of its files.

    What files have in another layout than the modules (a mixture's experts one by one, another name of the head) is compared
    when it is loaded: a weight is absent here only if the files hold nothing beside the modules' names.
    """
    stored = stored_tensors(folder, weight_files(folder))
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items() if "lora_" not in name and "magnitude" not in name}
    if len(wanted.keys() & stored.keys()) >= 0.9 * len(wanted):
        if stored.keys() - wanted.keys():
            wanted = {name: shape for name, shape in wanted.items() if name in stored}
        _check_stored(wanted, {name: tensor for name, tensor in stored.items() if name in wanted}, folder, builder)


def _check_stored(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Stored], folder: Path, builder: str) -> None:
    """Refuse a folder that has quantised tensors, lacks a wanted one, or has it in another shape."""
    if quantized := sorted(name for name, tensor in found.items() if _is_quantized(name, tensor)):
        kind = found[quantized[0]].dtype
        raise InputError(
            f"the weights in {folder} are quantised ({_first(quantized)} is of type {kind}), and training needs them in bf16 "
            "or fp32; set checkpoint_dir to the unquantised model"
        )
    if missing := sorted(wanted.keys() - found.keys()):
        raise InputError(f"checkpoint folder {folder} has no tensor {_first(missing)}, which {builder} needs; {_OTHER_FOLDER}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise InputError(
                f"tensor {name} in {folder / found[name].file} has shape {list(found[name].shape)}, and {builder} needs "
                f"{list(shape)}; check checkpoint_dir and `model`"
            )


# What the Hub's ways to quantise add beside a weight: GPTQ and AWQ, bitsandbytes, FP8, compressed-tensors, torchao.
_SCALES = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|weight[._](scale\w*|zero_point|packed|format|absmax))$"
)


def _is_quantized(name: str, tensor: Stored) -> bool:
    """Return whether a tensor holds quantised values or their scales, whatever config.json says."""
    return bool(_SCALES.search(name)) or tensor.dtype.startswith(QUANTIZED)


def _family_of(attention: nn.Module) -> str:
    if attention.q_norm is not None:
        return "qwen3"
    return "qwen2" if getattr(attention.q_proj, "bias", None) is not None else "llama"


def _first(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1:,} more)" if len(names) > 1 else "")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "llama3(" + ", ".join(f"{name} {number:g}" for name, number in value.items()) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)
