"""Find what a device can do per second: measured here, or published peaks times the share of them that is usually reached."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torchtune.models.llama3 import llama3

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Hold the rates of one device."""

    name: str
    kind: Literal["cpu", "cuda"]
    flops_per_s: float  # in large matrix products of the run's dtype
    thin_flops_per_s: float  # in products with few rows, as in decoding
    bytes_per_s: float  # read from or written to memory
    layer_s: float  # seconds of Python and kernel launches per decoder layer forward, the same for every size
    memory_bytes: float  # all of the device's memory


# Published dense peaks (bf16; fp32 without TF32) and bandwidth of the SXM 80 GB parts, in FLOP/s and bytes/s.
_PEAKS = {
    "h100": {"bf16": 989e12, "fp32": 67e12, "bytes": 3.35e12},
    "a100": {"bf16": 312e12, "fp32": 19.5e12, "bytes": 2.04e12},
}
# Assumed, not measured here: half the peak in matrix products of training sizes, four fifths of the bandwidth in long copies,
# 0.4 ms for the thirty kernels or so that an eager decoder layer launches from Python.
_MATMUL_SHARE, _COPY_SHARE, _EAGER_LAYER_S = 0.5, 0.8, 4e-4
PRESETS = tuple(_PEAKS)
_THIN = 32  # rows of a product that counts as thin


def preset(name: str, dtype: torch.dtype) -> Device:
    peaks = _PEAKS[name]
    flops = peaks["bf16" if dtype.itemsize == 2 else "fp32"] * _MATMUL_SHARE
    return Device(name, "cuda", flops, flops, peaks["bytes"] * _COPY_SHARE, _EAGER_LAYER_S, 79 * GIB)


@torch.no_grad()
def measured(device: torch.device, dtype: torch.dtype) -> Device:
    """Measure the rates of this machine's device, in about a second."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    x = torch.empty(2**26 if device.type == "cpu" else 2**30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    layer = llama3(vocab_size=2, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=16, max_seq_len=8).layers[0]
    layer, one = layer.to(device=device, dtype=dtype), torch.zeros(1, 1, 16, device=device, dtype=dtype)
    return Device(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU",
        kind=device.type,
        flops_per_s=2 * size**3 / _fastest(lambda: a @ b, device),
        thin_flops_per_s=2 * _THIN * size**2 / _fastest(lambda: a[:_THIN] @ b, device),
        bytes_per_s=2 * x.numel() / _fastest(lambda: y.copy_(x), device),
        layer_s=_fastest(lambda: layer(one), device),
        memory_bytes=_memory_bytes(device),
    )


def _fastest(run: Callable[[], object], device: torch.device, seconds: float = 0.3) -> float:
    """Return the seconds of the fastest of as many calls as fit into ``seconds``, at least three, after one untimed call."""
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 4 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def _memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
