"""Move written checkpoints into the folder of a run, and remove old ones: a kill at any moment leaves a whole newest one."""

import os
from collections.abc import Collection
from pathlib import Path

from torchtune import utils

from pidistill.errors import InputError
from pidistill.training.disk import free_name, remove_tree, set_usual_modes, sync, sync_tree
from pidistill.training.run_folder import BEGAN, LATEST, step_folder, step_folders, step_of
from pidistill.training.training_state import DAMAGED, WeightMarks, read_state

log = utils.get_logger("INFO")


def publish(new: Path, output_dir: Path, step: int, marks: WeightMarks, resumed_step: int) -> None:
    """Move the folder ``new`` to `step_N` and the link to it, each only once what it names is on the disk.

    Args:
        marks: checksums of the weights in ``new``; an older `step_N` with other weights is kept under another name.
        resumed_step: the step that the run resumed from, 0 for a fresh run: a `latest` that is a folder gets its name.
    """
    folder = step_folder(output_dir, step)
    set_usual_modes(new)
    sync_tree(new)
    if os.path.lexists(folder):
        _move_aside(folder, new.parent / "replaced", marks)
    os.replace(new, folder)
    sync(output_dir)
    latest, link = output_dir / LATEST, output_dir / f".{LATEST}"
    if os.path.lexists(latest) and not latest.is_symlink():  # object stores and `cp -rL` make a folder of the link
        _rename_plain_latest(latest, step_folder(output_dir, resumed_step))
    remove_tree(link)
    link.symlink_to(folder.name)
    os.replace(link, latest)
    (output_dir / BEGAN).unlink(missing_ok=True)
    sync(output_dir)


def _move_aside(folder: Path, to_remove: Path, marks: WeightMarks) -> None:
    """Make room for a new `step_N`: a kill before the link moved leaves the same step; anything else is kept."""
    if _has_weights(folder, marks):
        os.rename(folder, to_remove)
        return
    kept = free_name(folder.with_name(f"{folder.name}_replaced"))
    log.warning(f"{folder} holds other weights than the {folder.name} that was trained now; it is kept as {kept.name}")
    os.rename(folder, kept)


def _has_weights(folder: Path, marks: WeightMarks) -> bool:
    """Return whether the training state of a checkpoint says that it holds the weights which ``marks`` describes."""
    try:
        return read_state(folder).get("weights") == marks
    except (InputError, *DAMAGED):
        return False


def _rename_plain_latest(latest: Path, target: Path) -> None:
    if os.path.lexists(target):
        target = free_name(latest.with_name(f"{LATEST}_copy"))
    log.warning(f"{latest} is not a link; it is kept as {target.name}")
    os.rename(latest, target)


def remove_old(output_dir: Path, step: int, keep_last: int | None, used: Collection[Path]) -> None:
    """Remove checkpoints up to ``step``; the newest ``keep_last`` (None: all) and those that hold a folder of ``used`` stay."""
    if not keep_last:
        return
    for folder in [folder for folder in step_folders(output_dir) if step_of(folder) <= step][:-keep_last]:
        if not any(path.is_relative_to(folder.resolve()) for path in used):
            # A half-removed folder must not look like a checkpoint.
            removed = output_dir / ".removing"
            remove_tree(removed)
            os.rename(folder, removed)
            remove_tree(removed)
