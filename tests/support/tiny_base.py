"""Make a random checkpoint of the tiny world in milliseconds."""

from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from pidistill.config import build
from pidistill.envs.tiny_world.world import VOCAB
from tests.support.runs import ROOT


def make_base(folder: Path, model: dict[str, int]) -> Path:
    """Write random weights under which two views differ and a turn ends after about five words."""
    cfg = OmegaConf.load(ROOT / "configs" / "tiny" / "base.yaml")
    paths = {"checkpointer.checkpoint_dir": str(folder), "output_dir": str(folder.parent / "unused")}
    for key, value in (model | paths).items():
        OmegaConf.update(cfg, key, value)
    build(cfg.checkpointer, output_dir=cfg.output_dir)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for tensor in weights.values():
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.mul_(8.0)
    # A direction that every hidden state shares, and that the end of a turn answers to.
    shared = torch.randn(cfg.model.embed_dim, generator=generator).sign() * 0.3
    weights["model.embed_tokens.weight"] += shared
    weights["lm_head.weight"][VOCAB.index("end")] += 1.2 * shared
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
