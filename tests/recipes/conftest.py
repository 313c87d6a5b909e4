"""Make a random checkpoint of the tiny world in milliseconds, and leave the process as it was before a recipe."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support.runs import MODEL, quick_setup
from tests.support.tiny_base import make_base

# The smallest width whose matrices two ranks share in whole blocks of NF4 and of an optimizer's 8-bit states.
WIDE = {"model.embed_dim": 256, "model.intermediate_dim": 256}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("tiny_base"), MODEL)


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("wide_base"), MODEL | WIDE)


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
