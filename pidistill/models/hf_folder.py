"""Read what a folder in Hugging Face's format holds, from config.json, the index and the files' headers, not their weights.

Whoever made the folder chose what is in it. Names that lead out of the folder are refused, and nothing in it is executed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pidistill.errors import InputError, one_line
from pidistill.jsonl import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUANTIZED = ("I", "U", "F8", "F4", "F6")  # how the types of quantised values begin


@dataclass(frozen=True)
class Stored:
    """Say where a tensor is, its shape, and its type as safetensors writes it (``F32``, ``BF16``, ``I8``)."""

    file: str
    shape: tuple[int, ...]
    dtype: str = ""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    if not path.is_file():
        raise InputError(f"checkpoint folder {path.parent} has no {path.name} ({_holds(path.parent)}); check checkpoint_dir")
    return read_object(path, "copy or download it again")


def weight_files(folder: Path) -> list[str]:
    """Return the files of the model: model.safetensors, or those that the index names, whichever transformers would take."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        old = any(folder.glob("*.bin"))
        advice = (
            "its weights are in an older format: load and save it once with transformers, which writes safetensors"
            if old
            else "check checkpoint_dir"
        )
        raise InputError(f"checkpoint folder {folder} has neither {SINGLE} nor {INDEX} ({_holds(folder)}); {advice}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{folder / INDEX} has no weight_map from tensors to files; download or copy the folder again")
    for name in weight_map.values():
        check_plain_name(name, str(folder / INDEX))
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or not names:
        missing = f"{len(absent)} of {len(names)} weight files, {', '.join(absent[:3])}{', …' if len(absent) > 3 else ''},"
        raise InputError(
            f"checkpoint folder {folder} lacks {missing if names else 'weight files:'} that its {INDEX} names"
            f"{'' if names else ' none'}; download or copy the folder again"
        )
    return names


def check_plain_name(name: Any, source: str) -> None:
    """Refuse a file name that leads out of its folder: weights are later written under the same name."""
    if not isinstance(name, str) or not name or name in (".", "..") or any(mark in name for mark in "/\\\0"):
        raise InputError(f"{source} names the weight file {name!r}, which is not a plain file name; do not trust this folder")


def stored_tensors(folder: Path, files: Sequence[str]) -> dict[str, Stored]:
    """Return every tensor of the safetensors files, by name."""
    found: dict[str, Stored] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            raise InputError(f"checkpoint folder {folder} has no file {name} ({_holds(folder)}); check checkpoint_files")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(key)
                    found[key] = Stored(name, tuple(tensor.get_shape()), str(tensor.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file "
                f"({one_line(error)}): a download was cut short, or this is a git-lfs pointer; fetch it again"
            ) from error
    return found


def _holds(folder: Path) -> str:
    if not folder.is_dir():
        return "it does not exist"
    return f"it holds {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}"
