"""Read and write LoRA and DoRA adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

`peft.PeftModel.from_pretrained(base, folder)` puts such a folder onto the base model in transformers. Llama's and Mistral's
query and key rows are permuted between torchtune (which rotates neighbouring pairs) and Hugging Face (halves), and so are the
rows of B and of DoRA's magnitude; Qwen's keep their order.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pidistill.errors import InputError, one_line
from pidistill.models.adapters import PARTS, adapter_modules, is_dora, rank_of, scale_of
from pidistill.models.hf_folder import read_json
from pidistill.models.hf_format import FAMILIES, LIKE_LLAMA

FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_BACK = {theirs: ours for ours, theirs in _MODULES.items()}
_PARTS = dict(zip(PARTS, ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), strict=True))
_PREFIX = "base_model.model."
# What changes the adapted layer beyond rank, α and DoRA, and the value under which it does not.
_PLAIN = {"use_rslora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "lora_bias": False}
_NOT_READ = _PLAIN | {"layer_replication": None, "trainable_token_indices": None, "alora_invocation_tokens": None}
_MOVES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Adapter:
    """Hold a PEFT folder under torchtune's names."""

    folder: Path
    tensors: dict[str, Tensor]  # of each layer lora_a.weight [r, in], lora_b.weight [out, r] and, of DoRA, magnitude [out]
    alphas: dict[str, float]  # α of each adapted layer
    dora: bool

    def rank(self, layer: str) -> int:
        return self.tensors[f"{layer}.lora_a.weight"].shape[0]

    @property
    def scales(self) -> dict[str, float]:
        """Return α/r of each adapted layer."""
        return {layer: alpha / self.rank(layer) for layer, alpha in self.alphas.items()}


# ---------------------------------------------------------------------------------------------- write


def write(folder: Path, model: nn.Module, weights: Mapping[str, Tensor], hf_config: Mapping[str, Any], base: str) -> None:
    """Write ``model``'s adapters, with the values in the full state dict ``weights``, as PEFT reads them.

    Args:
        hf_config: the base's config.json.
        base: what becomes base_model_name_or_path.
    """
    tensors = {}
    for layer, module in adapter_modules(model):
        for part in module.adapter_params():
            rows = weights[f"{layer}.{part}"]
            rows = rows if part == "lora_a.weight" else _permuted(rows, layer, hf_config, to_hf=True)
            tensors[f"{_PREFIX}{hf_name(layer)}.{_PARTS[part]}"] = rows.contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(model, base), indent=2))


def _config(model: nn.Module, base: str) -> dict[str, Any]:
    layers = {hf_name(name): module for name, module in adapter_modules(model)}
    ranks = {name: rank_of(module) for name, module in layers.items()}
    # DoRA's layer keeps only α/r, whose product with r is α except for rounding.
    alphas = {name: float(f"{scale_of(module) * ranks[name]:.9g}") for name, module in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "use_dora": any(is_dora(module) for module in layers.values()),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        **_PLAIN,
    }


def hf_name(layer: str) -> str:
    """Return a layer's name in transformers: layers.3.attn.q_proj → model.layers.3.self_attn.q_proj; output → lm_head.

    A decoder of transformers has these names already.
    """
    if layer == "output":
        return "lm_head"
    if not layer.startswith("layers."):
        return layer
    _, number, module = layer.split(".", 2)
    return f"model.layers.{number}.{_MODULES[module]}"


def _permuted(rows: Tensor, layer: str, hf_config: Mapping[str, Any], *, to_hf: bool) -> Tensor:
    """Return the rows [out, …] of a query or key in the other format's order; those of every other layer unchanged."""
    heads = {"attn.q_proj": "num_attention_heads", "attn.k_proj": "num_key_value_heads"}
    key = next((key for module, key in heads.items() if layer.endswith(module)), None)
    if key is None or hf_config["model_type"] not in LIKE_LLAMA or not layer.startswith("layers."):
        return rows
    number = hf_config.get(key) or hf_config["num_attention_heads"]
    pairs = rows.shape[0] // number // 2
    split = (number, pairs, 2) if to_hf else (number, 2, pairs)
    return rows.reshape(*split, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


# ---------------------------------------------------------------------------------------------- read


def read(folder: Path, hf_config: Mapping[str, Any], own_names: bool = False) -> Adapter:
    """Return what a PEFT folder of LoRA or DoRA holds, under the names of torchtune or, with ``own_names``, its own."""
    config = _read_config(folder, hf_config, own_names)
    tensors: dict[str, Tensor] = {}
    for name, tensor in _load(folder / WEIGHTS).items():
        layer, part = _from_hf(name, folder, own_names)
        rows = tensor.squeeze() if part == "magnitude" else tensor
        tensors[f"{layer}.{part}"] = rows if part == "lora_a.weight" else _permuted(rows, layer, hf_config, to_hf=False)
    dora = bool(config.get("use_dora", False))
    layers = sorted({name.removesuffix(f".{part}") for name in tensors for part in PARTS if name.endswith(f".{part}")})
    for layer in layers:
        _check_layer(layer, tensors, config, folder, dora)
    alphas = {layer: float(_own(config, "alpha_pattern", "lora_alpha", layer)) for layer in layers}
    return Adapter(folder, tensors, alphas, dora)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file ({one_line(error)}): a "
            "download was cut short, or this is a git-lfs pointer; fetch it again, or check adapter_dir"
        ) from error


def _read_config(folder: Path, hf_config: Mapping[str, Any], own_names: bool) -> dict[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            present = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no folder"
            raise InputError(f"adapter_dir={folder} has no {name} ({present}); name a folder that PEFT saved an adapter in")
    if not own_names and hf_config.get("model_type") not in FAMILIES:
        raise InputError(
            f"adapters are read for {', '.join(FAMILIES)}, and config.json beside the weights has model_type "
            f"{hf_config.get('model_type')!r}; remove adapter_dir"
        )
    config = read_json(folder / CONFIG)
    if absent := [key for key in ("r", "lora_alpha") if key not in config and config.get("peft_type") == "LORA"]:
        raise InputError(f"{folder / CONFIG} has no {absent[0]}, as PEFT writes it; check adapter_dir")
    _check_values(config, folder)
    changes = {key: config[key] for key, plain in _NOT_READ.items() if (config.get(key) or plain) != plain}
    changes |= {key: config[key] for key in ("peft_type",) if config.get(key) != "LORA"}
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        changes["init_lora_weights"] = start  # its base is not the checkpoint's
    if changes:
        found = ", ".join(f"{key}={value}" for key, value in changes.items())
        raise InputError(
            f"the adapter in {folder} has {found}, and only plain LoRA and DoRA can be read; merge it into the base with PEFT, "
            "and name the merged folder in checkpointer.checkpoint_dir"
        )
    return config


def _check_values(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse ranks and α that are no numbers, and patterns that could take days to compare with a name."""
    values = {key: config[key] for key in ("r", "lora_alpha") if key in config}
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise InputError(f"{folder / CONFIG} has {key} {config[key]!r}, which is not an object; check adapter_dir")
        values |= {f"{key} {name}": value for name, value in (config.get(key) or {}).items()}
        for pattern in config.get(key) or {}:
            if not _is_pattern(pattern):
                raise InputError(
                    f"{folder / CONFIG} has {key} {pattern!r}, and only patterns of layer names can be read; check adapter_dir"
                )
    for key, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
            raise InputError(f"{folder / CONFIG} has {key} {value!r}, which must be a positive number; check adapter_dir")


def _is_pattern(text: str) -> bool:
    """Return whether a name's pattern is one that is compared at once: few stars, no groups and no repeated groups."""
    if not re.fullmatch(r"[\w.\\^$|*]+", text) or text.count("*") > 2:
        return False
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _from_hf(name: str, folder: Path, own_names: bool) -> tuple[str, str]:
    found = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name)
    part = found and next(ours for ours, theirs in _PARTS.items() if theirs.startswith(found[2]))
    if found and own_names:
        return found[1], part
    if found and found[1] == "lm_head":
        return "output", part
    place = found and re.fullmatch(r"model\.layers\.(\d+)\.(.+)", found[1])
    if not place or place[2] not in _BACK:
        raise InputError(
            f"the adapter in {folder} has a tensor {name}, and adapters are read for {', '.join(_BACK)} and lm_head; train it "
            "with those target_modules"
        )
    return f"layers.{place[1]}.{_BACK[place[2]]}", part


def _check_layer(layer: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, dora: bool) -> None:
    wanted = PARTS if dora else PARTS[:2]
    for part in wanted:
        if f"{layer}.{part}" not in tensors:
            raise InputError(
                f"the adapter in {folder} lacks {_PREFIX}{hf_name(layer)}.{_PARTS[part]}; the file is incomplete, save it again"
            )
    for part in PARTS[:2]:
        if tensors[f"{layer}.{part}"].ndim != 2:
            raise InputError(f"the adapter in {folder} has a {part} of {hf_name(layer)} that is not a matrix; save it again")
    rank, found = int(_own(config, "rank_pattern", "r", layer)), tensors[f"{layer}.lora_a.weight"].shape[0]
    if rank != found or tensors[f"{layer}.lora_b.weight"].shape[1] != found:
        raise InputError(
            f"the adapter in {folder} says rank {rank} for {hf_name(layer)} and its tensors have {found}; {CONFIG} and "
            f"{WEIGHTS} are not of the same adapter"
        )


def _own(config: Mapping[str, Any], pattern: str, key: str, layer: str) -> Any:
    """Return a layer's own value, by PEFT's rule that a pattern is the end of the name, or the common value."""
    for own, value in (config.get(pattern) or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{own})", hf_name(layer)):
            return value
    return config[key]
