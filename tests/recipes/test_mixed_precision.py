"""Mixed precision (`dtype: fp32`, `compute_dtype: bf16`): runs of whole recipes."""

import copy

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.support.runs import metrics, run, small_config, weights

MIXED = {"dtype": "fp32", "compute_dtype": "bf16"}
EMA = {"_component_": "pidistill.teachers.EMATeacher", "rate": 0.3}


@pytest.mark.parametrize("method", ["pi_distill", "opsd"])
def test_smoke(method, tiny_base, tmp_path):
    recipe = run(method, small_config(method, tiny_base, tmp_path / "mixed", **MIXED))
    for name, p in recipe._model.named_parameters():
        assert p.dtype == torch.float32 and isinstance(p, DTensor)
    run(method, small_config(method, tiny_base, tmp_path / "fp32"))
    a, b = metrics(tmp_path / "mixed"), metrics(tmp_path / "fp32")
    for x, y in zip(a, b):
        print({k: (x[k], y[k]) for k in ("loss", "grad_norm", "reward_mean", "sampler_mismatch_nats") if k in x})
    print(a[-1])
