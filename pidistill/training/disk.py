"""Write files and folders so that a kill, a full disk or a planted link does no harm."""

import errno
import filecmp
import itertools
import os
import shutil
import stat
from pathlib import Path

from torchtune import utils
from torchtune.training.checkpointing._utils import SUFFIXES_TO_NOT_COPY

from pidistill.errors import InputError
from pidistill.jsonl import umask

log = utils.get_logger("INFO")

# The disk is full, a quota or a limit is reached, it is read-only, or it fails.
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def is_disk_fault(error: BaseException) -> bool:
    """Return whether an error says that the disk does not take what a run writes."""
    return isinstance(error, OSError) and error.errno in _DISK_FAULTS


def remove_tree(path: Path) -> None:
    """Remove a folder, or a file or link in its place; what a link leads to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def free_name(path: Path) -> Path:
    """Return ``path`` with the lowest number behind its name that gives one which nothing has: `replaced_1`."""
    return next(found for n in itertools.count(1) if not os.path.lexists(found := path.with_name(f"{path.name}_{n}")))


def check_copyable(folder: Path) -> None:
    """Refuse a model folder that cannot be copied into a checkpoint: the first save would fail, after hours of training."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(root, name) for name in (*folders, *files) if not name.startswith(".")):
            if path.is_symlink() and not path.exists():
                raise InputError(f"{path} is a link that leads to nothing; remove it, or copy the folder again")
            if path.is_dir() and path.suffix in (".json", ".safetensors", ".pt", ".bin"):
                raise InputError(f"{path} is a folder with the name of a file; remove it, or copy the model's folder again")
            if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):
                raise InputError(f"{path} is not a plain file, and could not be copied into a checkpoint; remove it")


def remove_outside_copies(source: Path, copy: Path) -> None:
    """Remove what was copied through links of a model folder that lead out of it: they could name any file of this machine.

    The hub's cache keeps its files in `blobs` beside `snapshots`, which counts as inside. Weights and config.json are written,
    not copied.
    """
    root = source.resolve()
    inside = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for path in [path for path in copy.rglob("*") if path.is_file()]:
        original = source / path.relative_to(copy)
        written = path.name == "config.json" or path.name.endswith(tuple(SUFFIXES_TO_NOT_COPY))
        if written or not original.is_file():
            continue
        target = original.resolve()
        outside = not any(folder in target.parents for folder in inside)
        if outside and filecmp.cmp(path, target, shallow=False):
            log.warning(f"{original} is a link to {target}, outside its folder; it is left out of the checkpoint")
            path.unlink()


def set_usual_modes(folder: Path) -> None:
    """Give every file and folder the mode that the umask says: a copy of a read-only or private file would keep its mode."""
    mask = umask()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def sync_tree(folder: Path) -> None:
    """Wait until every file below a folder, and the folder's entries, are on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
