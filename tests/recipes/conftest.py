"""A random tiny-world checkpoint, made in milliseconds, and a process that a recipe leaves as it found it."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from pidistill.config import build
from pidistill.envs.tiny_world.world import VOCAB
from tests.support.runs import MODEL, ROOT, quick_setup

# The smallest width whose matrices two ranks share in whole blocks of NF4 and of an optimizer's 8-bit states.
WIDE = {"model.embed_dim": 256, "model.intermediate_dim": 256}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("tiny_base"), MODEL)


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("wide_base"), MODEL | WIDE)


def make_base(folder: Path, model: dict[str, int]) -> Path:
    """Random weights under which two views differ and a turn ends after about five words."""
    cfg = OmegaConf.load(ROOT / "configs" / "tiny" / "base.yaml")
    paths = {"checkpointer.checkpoint_dir": str(folder), "output_dir": str(folder.parent / "unused")}
    for key, value in (model | paths).items():
        OmegaConf.update(cfg, key, value)
    build(cfg.checkpointer)
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


@pytest.fixture(scope="session", autouse=True)
def fast_setup():
    with quick_setup():
        yield


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was():
    threads, level = torch.get_num_threads(), logging.root.level
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    logging.root.setLevel(level)
