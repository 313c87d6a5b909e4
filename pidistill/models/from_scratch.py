"""Make a checkpoint of random weights, for models that are trained from nothing."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torchtune import training
from torchtune.models import convert_weights
from torchtune.modules import TransformerDecoder

from pidistill.errors import InputError
from pidistill.models.hf_folder import SINGLE, weight_files


def from_scratch(
    checkpoint_dir: str,
    output_dir: str,
    model: TransformerDecoder,
    hf_config: dict[str, Any],
    model_type: str,
    seed: int = 0,
    checkpoint_files: list[str] | None = None,
) -> training.FullModelHFCheckpointer:
    """Return a torchtune HF checkpointer; its initial checkpoint is made from random weights if it is not there yet.

    It serves to train a small base from nothing. ``hf_config`` becomes config.json and must describe ``model``; linear weights
    are drawn with standard deviation 0.02, embeddings with 0.05. Without ``checkpoint_files`` the files are those that the
    folder's index names, so that a checkpoint of a run can stand in place of the initial one, to resume or to evaluate it.
    """
    folder = Path(checkpoint_dir)
    if re.fullmatch(r"latest|step_\d+", folder.name) and not (folder / "config.json").is_file():
        raise InputError(
            f"checkpoint folder {folder} is named like the checkpoint of a run and holds no config.json; no random weights are "
            "written there: train first, or check checkpoint_dir"
        )
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    if is_main and not (folder / "config.json").is_file():
        _write_random_weights(folder, model, hf_config, seed)
    if dist.is_initialized():
        dist.barrier()
    return training.FullModelHFCheckpointer(
        checkpoint_dir=checkpoint_dir,
        checkpoint_files=checkpoint_files or weight_files(folder),
        model_type=model_type,
        output_dir=output_dir,
    )


def _write_random_weights(folder: Path, model: TransformerDecoder, hf_config: dict[str, Any], seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.05 if name.startswith("tok_embeddings") else 0.02, generator=generator)
    weights = convert_weights.tune_to_hf(
        model.state_dict(),
        num_heads=hf_config["num_attention_heads"],
        num_kv_heads=hf_config["num_key_value_heads"],
        dim=hf_config["hidden_size"],
    )
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / SINGLE, metadata={"format": "pt"})
    # Last: a folder with a config.json is a whole one.
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2))
