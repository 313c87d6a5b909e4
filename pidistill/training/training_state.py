"""Read and check `training_state.pt`: what a run needs beside the weights of a checkpoint to resume exactly.

A file that was cut short, overwritten, or put into the wrong folder is found here and not after hours of training: by the
checksums that the file holds of its own records, by the types of its entries, by the step in its folder's name, and by the
checksums of the weights beside it.
"""

import pickle
import random
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from pidistill.errors import InputError
from pidistill.training.run_folder import STATE_FILE, step_of

FORMAT = 1

WeightMarks = dict[str, tuple[int, str]]  # name → checksum of a weight's bytes, and its dtype

# The exceptions that reading raises where a file was cut short or overwritten.
DAMAGED = (
    RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
    RecursionError, OverflowError, SafetensorError, zipfile.BadZipFile,
)  # fmt: skip

_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "method": str, "must_match": dict, "step": int, "round": int, "optimizer": dict, "scheduler": (dict, type(None)),
    "teacher": dict, "skipped_steps": (tuple, list), "rng": list,
}  # fmt: skip


def check_records(path: Path) -> None:
    """Compare the file with the checksums of its own records, which torch.load does not do."""
    with zipfile.ZipFile(path) as file:
        if (broken := file.testzip()) is not None:
            raise ValueError(f"its record {broken} has another checksum than when it was written")


def read_state(folder: Path) -> dict[str, Any]:
    """Return the training state of a checkpoint's folder, on CPU; its tensors stay in the file until they are used.

    A file that is not what was written raises one of ``DAMAGED``, one of a later version of this package an InputError.
    """
    state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    found = state.get("format", FORMAT)
    if not isinstance(found, int):
        raise ValueError(f"its format is {found!r}")
    if found > FORMAT:
        raise InputError(
            f"{folder / STATE_FILE} has format {found} and this version of pidistill reads up to {FORMAT}; resume with the "
            "version that wrote it"
        )
    for key, kinds in _KINDS.items():
        if not isinstance(state[key], kinds):
            raise ValueError(f"its {key} is a {type(state[key]).__name__}")
    if min(state["step"], state["round"]) < 0 or not state["rng"] or not state["optimizer"]:
        raise ValueError(f"its step is {state['step']}, its round {state['round']}, or its random or optimizer state is empty")
    if folder.name.removeprefix("step_").isdecimal() and state["step"] != step_of(folder):
        raise ValueError(f"it is the state of step {state['step']}")
    return state


def weight_marks(weights: Mapping[str, torch.Tensor]) -> WeightMarks:
    """Return a checksum of each tensor's bytes and its dtype, by name. The tensors are on CPU."""
    return {name: (_checksum(tensor), str(tensor.dtype).removeprefix("torch.")) for name, tensor in weights.items()}


def check_weights(weights: Mapping[str, torch.Tensor], marks: WeightMarks | Mapping[str, int]) -> None:
    """Compare loaded weights with the checksums of the saved ones.

    A checkpointer may load a weight in a wider dtype than it was saved in, so each is first put back into its own. States that
    older versions wrote have no dtypes.
    """
    if absent := sorted(marks.keys() - weights.keys()):
        raise ValueError(f"{absent[0]} is absent")
    if changed := sorted(name for name, mark in marks.items() if not _has_mark(weights[name], mark)):
        raise ValueError(f"{changed[0]} has other values than when the training state beside it was written")


def _has_mark(tensor: torch.Tensor, mark: int | tuple[int, str]) -> bool:
    if isinstance(mark, int):
        return _checksum(tensor) == mark
    checksum, dtype = mark
    return _checksum(tensor.to(getattr(torch, dtype))) == checksum


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def base_mark(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the first elements of each matrix as it was loaded, which tell one base from another."""
    return torch.cat([tensor[0, :4].float() for _, tensor in sorted(weights.items()) if tensor.ndim == 2])


def random_state() -> dict[str, Any]:
    """Return the state of torch's, Python's and numpy's streams, which an environment or a reward may draw from."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
