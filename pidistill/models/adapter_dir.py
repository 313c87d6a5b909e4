"""Put the adapter of `adapter_dir` onto the base of a config: check that it fits, then load it beside or into the base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from pidistill.errors import InputError
from pidistill.models.adapters import adapter_modules, has_adapters, is_dora, merge, rank_of, scale_of
from pidistill.models.empty import shared_empty_model
from pidistill.models.hf_folder import read_json
from pidistill.models.peft_format import CONFIG, FOLDER, Adapter, hf_name, read
from pidistill.models.protocol import has_own_names


def check_fits(adapter: Adapter, model: nn.Module) -> None:
    """Refuse an adapter that ``model`` (which may be on meta) cannot take: into its adapters, or merged into its weights."""
    own, weights = dict(adapter_modules(model)), dict(model.named_parameters())
    for layer in adapter.alphas:
        _check_base_shape(adapter, layer, weights.get(f"{layer}.weight"))
    if not own:
        return
    if adapter.alphas.keys() != own.keys():
        raise InputError(_other_layers(adapter, own))
    for layer, module in own.items():
        theirs = {"lora_rank": adapter.rank(layer), "lora_alpha": adapter.alphas[layer], "use_dora": adapter.dora}
        ours = {"lora_rank": rank_of(module), "lora_alpha": scale_of(module) * rank_of(module), "use_dora": is_dora(module)}
        for key, value in theirs.items():
            if abs(value - ours[key]) > 1e-6 * abs(value):
                raise InputError(
                    f"the adapter in {adapter.folder} has {key}={_shown(value)} on {hf_name(layer)} and `model` "
                    f"{_shown(ours[key])}; set model.{key}={_shown(value)}"
                )


def _shown(value: float | bool) -> str:
    return str(value) if isinstance(value, bool) else f"{value:g}"


def _other_layers(adapter: Adapter, own: Mapping[str, nn.Module]) -> str:
    kinds = [sorted({hf_name(layer).rpartition(".")[2] for layer in layers}) for layers in (adapter.alphas, own)]
    theirs, ours = (", ".join(kind) for kind in kinds)
    remedy = "set model.lora_attn_modules and model.apply_lora_to_mlp to what the adapter has"
    if "output" in adapter.alphas and "output" not in own:
        remedy = "an adapter of the output head is not trained here: set a `model` without adapters, which has it merged"
    return (
        f"the adapter in {adapter.folder} adapts {len(adapter.alphas)} layers ({theirs}) and `model` {len(own)} ({ours}); "
        f"{remedy}"
    )


def _check_base_shape(adapter: Adapter, layer: str, weight: Tensor | None) -> None:
    # A tied head has no weight of its own.
    found = (adapter.tensors[f"{layer}.lora_b.weight"].shape[0], adapter.tensors[f"{layer}.lora_a.weight"].shape[1])
    if weight is None or tuple(weight.shape) != found:
        ours = "has no such weight" if weight is None else f"has {weight.shape[0]}x{weight.shape[1]}"
        raise InputError(
            f"the adapter in {adapter.folder} is of another base: it adapts {hf_name(layer)} of {found[0]}x{found[1]}, and "
            f"`model` {ours} there; check adapter_dir, model and checkpointer.checkpoint_dir"
        )


def check_adapter_dir(cfg: DictConfig) -> None:
    """Refuse an `adapter_dir` that cannot be read, or that `model` cannot take, before any weight is loaded."""
    if cfg.get("adapter_dir"):
        check_fits(_read_for(cfg), shared_empty_model(cfg.model))
        _check_not_merged_already(Path(cfg.adapter_dir), Path(cfg.checkpointer.get("checkpoint_dir") or ""))


def _check_not_merged_already(adapter_dir: Path, checkpoint_dir: Path) -> None:
    """Refuse an adapter on top of a run's own checkpoint, whose weights are merged: it would silently count twice."""
    bases = [base_of(folder) for folder in (adapter_dir, checkpoint_dir / FOLDER)]
    if bases[0] is not None and bases[0] == bases[1]:
        raise InputError(
            f"checkpointer.checkpoint_dir={checkpoint_dir} holds weights that have an adapter of {bases[0]} in them, and "
            f"adapter_dir={adapter_dir} would put another one on top; remove adapter_dir, or set checkpointer.checkpoint_dir "
            f"to {bases[0]}"
        )


def base_of(adapter_dir: Path) -> str | None:
    """Return the base that an adapter's folder names; None where it names none, or there is no such folder."""
    path = adapter_dir / CONFIG
    return read_json(path).get("base_model_name_or_path") if path.is_file() else None


def with_adapter_dir(cfg: DictConfig, model_node: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Return a base's full state dict with the adapter in `adapter_dir`; unchanged without the key.

    It is put beside the base's weights where the model has adapters, and merged into them where it has none.
    """
    if not cfg.get("adapter_dir"):
        return weights
    adapter = _read_for(cfg)
    both = {**weights, **adapter.tensors}
    return both if has_adapters(shared_empty_model(model_node)) else merge(both, adapter.scales)


def base_config(checkpoint_dir: str | None) -> dict[str, Any]:
    """Return the config.json of a checkpoint folder; empty where there is none."""
    path = Path(checkpoint_dir or "") / "config.json"
    return read_json(path) if checkpoint_dir and path.is_file() else {}


def _read_for(cfg: DictConfig) -> Adapter:
    own_names = has_own_names(shared_empty_model(cfg.model))
    return read(Path(cfg.adapter_dir), base_config(cfg.checkpointer.get("checkpoint_dir")), own_names)
