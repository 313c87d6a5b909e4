"""Build models without their weights: to be filled from a checkpoint, or to be looked at before one is loaded."""

import functools
import json
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from pidistill.config import build
from pidistill.errors import InputError, one_line
from pidistill.models.nf4 import give_out_whole_weights
from pidistill.models.protocol import Decoder


def empty_model(node: Any) -> Decoder:
    """Build a model without its weights, on the meta device."""
    try:
        with torch.device("meta"):
            model = build(node)
        give_out_whole_weights(model)
        return model
    except (AssertionError, InputError) as error:
        cause = error.__cause__ if isinstance(error, InputError) else error  # build() says an error of a builder in a sentence
        if not node.get("quantize_base", False) or not isinstance(cause, AssertionError):
            raise
        raise InputError(
            f"model.quantize_base=True cannot store this model in 4 bits ({one_line(cause)}): every matrix needs "
            "a multiple of 64*256 elements; set model.quantize_base=False"
        ) from cause


def model_nodes(cfg: DictConfig) -> dict[str, Any]:
    """Return the nodes of the trained model and of the teachers that have one of their own, by their keys."""
    nodes = {key: cfg[key] for key in ("model", "teacher_model") if cfg.get(key)}
    return nodes | {f"teacher_models.{name}": node for name, node in (cfg.get("teacher_models") or {}).items()}


def shared_empty_model(node: Any) -> Decoder:
    """Return the model of :func:`empty_model`, built once for all checks of a start. Nobody may change it."""
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return _build_once(json.dumps(plain, sort_keys=True), torch.get_default_dtype())


@functools.lru_cache(maxsize=8)  # model and teachers, and those of another config in the same process
def _build_once(node: str, dtype: torch.dtype) -> Decoder:
    return empty_model(json.loads(node))
