"""Keep a teacher's numbers on disk: it reads fixed rollouts once, and later epochs and runs read the file.

    folder/about.json           whose numbers these are: the teacher's config and weights, the dtype
    folder/head.safetensors     the teacher's output head
    folder/rows-*.safetensors   per rollout the hidden states [policy tokens, H] behind the final norm, under the rollout's key

The key of a rollout is a hash of the ids that the teacher reads and of which of them are policy tokens: with another template,
another control of the privileged information or another completion it is another rollout, and its numbers are never mixed up.
From the hidden states the scorer computes what it computes of a teacher in memory, to the bit, at any temperature. Where every
rollout is in the folder, the teacher's layers are never loaded.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune.utils import get_logger, log_rank_zero

from pidistill.distributed.run import gather_of_all
from pidistill.distributed.shards import forward_device
from pidistill.errors import InputError
from pidistill.models.precision import compute_dtype_of
from pidistill.models.protocol import Decoder, head_module, logit_cap
from pidistill.teachers import FrozenTeacher, HiddenMemory, LoadCopy, MixturePart
from pidistill.types import Rollout

log = get_logger("INFO")

ABOUT, HEAD = "about.json", "head.safetensors"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")


def rollout_key(rollout: Rollout) -> str:
    """Return a hash of what the teacher reads of a rollout, and of which tokens it is asked about."""
    return hashlib.blake2b(json.dumps(rollout.sequence("teacher")).encode(), digest_size=16).hexdigest()


class DiskMemory(HiddenMemory):
    """Keep hidden states in files: one more file for each micro-batch that the teacher has read.

    Several processes write and read the same folder. A file appears whole or not at all.
    """

    def __init__(self, folder: Path, add: bool) -> None:
        self.folder, self.add = folder, add
        self._files: dict[str, Path] = {}  # of each rollout's key
        self._seen: set[Path] = set()

    def kept(self, rollout: Rollout) -> Tensor | None:
        key = rollout_key(rollout)
        if key not in self._files:
            self._look_again()
        if key in self._files:
            return _read(self._files[key], key)
        if not self.add:
            raise InputError(
                f"{rollout.example.id}: {self.folder} has no numbers of the teacher for these ids; the completion, the chat "
                "template, privileged or its control differ from those of the run that wrote it: set teacher.add: true to "
                "score such rows now, or another teacher.folder"
            )
        return None

    def keep(self, rollouts: Sequence[Rollout], parts: Sequence[Tensor]) -> None:
        fresh = {rollout_key(r): h for r, h in zip(rollouts, parts, strict=True) if rollout_key(r) not in self._files}
        if fresh:
            path = self.folder / f"rows-{os.getpid()}-{hashlib.blake2b(''.join(fresh).encode(), digest_size=8).hexdigest()}"
            _write({key: h.cpu().contiguous() for key, h in fresh.items()}, path.with_suffix(".safetensors"))
            self._look_again()

    def _look_again(self) -> None:
        """Note the rollouts of files that were not there before."""
        for path in sorted(set(self.folder.glob("rows-*.safetensors")) - self._seen):
            with _opened(path) as file:
                self._files |= dict.fromkeys(file.keys(), path)
            self._seen.add(path)

    def __len__(self) -> int:
        self._look_again()
        return len(self._files)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove the file, and its rows are scored again") from error


def _read(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        return file.get_tensor(name)


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file aside and move it into its place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(tensors), aside)
    os.replace(aside, path)


class HeadAlone(nn.Module):
    """Stand for a teacher whose hidden states are at hand: a decoder without layers, with the head and its cap alone."""

    max_seq_len = 0

    def __init__(self, weight: Float[Tensor, "V H"], cap: float | None) -> None:
        super().__init__()
        with torch.device("meta"):
            self.output = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.output.weight = nn.Parameter(weight, requires_grad=False)
        self.tok_embeddings, self.layers, self.norm, self.logit_cap = None, nn.ModuleList(), nn.Identity(), cap

    def unembed(self, h: Float[Tensor, "*tokens H"]) -> Float[Tensor, "*tokens V"]:
        return self.output(h)


@dataclass(frozen=True)
class StoredPart(MixturePart):
    """Hold a part whose layers are loaded where a rollout is read that is not on disk."""

    load: Callable[[], Decoder] | None = None

    @contextmanager
    def weights(self) -> Iterator[Decoder]:
        yield self.load()


class StoredTeacher(FrozenTeacher):
    """Teach as :class:`FrozenTeacher` does, with the hidden states of every rollout kept on disk.

    For methods that learn from fixed completions (SemiOPD, GKD with ``lmbda: 0``): rollouts that are sampled anew are never
    found again. A folder takes H numbers of the teacher's dtype for each policy token, and its head once.

    Args:
        folder: where the numbers are, on a file system that all processes share; made where it is missing.
        add: score and add rollouts that are not in the folder; False refuses them.
    """

    def __init__(self, folder: str, add: bool = True) -> None:
        self.folder = Path(folder)
        self._memory = DiskMemory(self.folder, add)
        self._identity: dict[str, Any] = {}
        self._module: Decoder | None = None
        self._head: HeadAlone | None = None

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Say whose numbers these are, before anything is loaded; refuse a folder that holds another teacher's."""
        self._identity = json.loads(json.dumps(identity))
        told = self._about()
        if told is None:
            return
        differing = sorted(key for key, value in self._identity.items() if value != told.get(key, []))
        if differing:
            raise InputError(
                f"{self.folder} holds the numbers of another teacher: its {' and its '.join(differing)} differ from what the "
                "config says; set another teacher.folder, or correct teacher_model, teacher_checkpointer or dtype"
            )

    def attach(self, load_copy: LoadCopy) -> None:
        """Note how to load the weights; load them now where the folder has no head yet, and write that."""
        self._load_copy = load_copy
        self.identify(self._identity)  # again: two of several teachers may have named one new folder
        if not all(gather_of_all([(self.folder / HEAD).is_file()])):
            self._write_head()
        log_rank_zero(log, f"{self.folder} holds the teacher's numbers of {len(self._memory)} rollouts")

    @property
    def module(self) -> Decoder:
        """Return the whole teacher, loaded at the first use."""
        if self._module is None:
            log_rank_zero(log, f"loading the teacher: some rollouts are not in {self.folder}")
            self._module = self._load_copy().requires_grad_(False).eval()
        return self._module

    def mixture(self, model: Decoder) -> list[MixturePart]:
        if self._head is None:
            weight = _read(self.folder / HEAD, "weight").to(forward_device(model))
            self._head = HeadAlone(weight, self._about()["logit_cap"])
        return [StoredPart(1.0, self._head, memory=self._memory, load=lambda: self.module)]

    def _about(self) -> dict[str, Any] | None:
        """Return what the folder says of itself; None where it is new."""
        path = self.folder / ABOUT
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}); remove the folder, or set another teacher.folder") from error

    def _write_head(self) -> None:
        """Write the head, and whose it is; the same file whichever process is the last to write it."""
        head = head_module(self.module).weight.detach().to(compute_dtype_of(self.module))
        head = head.full_tensor() if isinstance(head, DTensor) else head
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self._identity | {"logit_cap": logit_cap(self.module)}
        aside = self.folder / f".{ABOUT}.{os.getpid()}"
        aside.write_text(json.dumps(about, indent=2), encoding="utf-8")
        os.replace(aside, self.folder / ABOUT)
        _write({"weight": head.cpu().contiguous()}, self.folder / HEAD)


def identity_of(model_node: Any, checkpointer_node: Any, dtype: str, adapter_dir: str | None = None) -> dict[str, Any]:
    """Return what a teacher's numbers depend on beside the tokens: its config, its weights' files, the dtype."""
    folders = [checkpointer_node.get("checkpoint_dir"), adapter_dir]
    model = OmegaConf.to_container(model_node, resolve=True) if isinstance(model_node, DictConfig) else dict(model_node)
    weights = [hash_of_weights(Path(folder)) for folder in folders if folder is not None]
    return {"model": model, "dtype": dtype, "weights": weights, "files": list(checkpointer_node.get("checkpoint_files") or [])}


def hash_of_weights(folder: Path, blocks: int = 64, block_bytes: int = 65536) -> dict[str, str]:
    """Return name → hash of config.json and of each file of weights: of its size and of up to ``blocks`` blocks spread over it.

    Whole files of a large model take minutes to read; other weights differ in nearly every block.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix in WEIGHT_FILES or path.name == "config.json")
    return {path.name: _hash_of_file(path, blocks, block_bytes) for path in files}


def _hash_of_file(path: Path, blocks: int, block_bytes: int) -> str:
    size = path.stat().st_size
    found = hashlib.blake2b(str(size).encode(), digest_size=16)
    starts = {max(0, size - block_bytes) * n // max(1, blocks - 1) for n in range(blocks)}
    with path.open("rb") as file:
        for start in sorted(starts):
            file.seek(start)
            found.update(file.read(block_bytes))
    return found.hexdigest()
