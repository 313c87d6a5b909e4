"""Decide about the folder of a run: who may write into it, whether a run starts or resumes, what config.yaml may hold.

`resume_from_checkpoint` decides what happens in an `output_dir` that holds a run:

| value | a run is there | none is there |
| --- | --- | --- |
| false | refused | starts |
| true | resumes | refused, unless a run began there and was killed before its first checkpoint |
| auto | resumes | starts |
| start_over | starts; the old files move to `output_dir/previous_N` | starts |
"""

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from pidistill.errors import InputError
from pidistill.jsonl import EVALUATED, TRAINING_ROLLOUTS, replace_file
from pidistill.training.disk import free_name

log = utils.get_logger("INFO")

STATE_FILE = "training_state.pt"
LATEST, BEGAN, LOCK = "latest", ".began", ".lock"
RESUME = "resume_from_checkpoint"
# Files that a run appends to or replaces.
_OWN_FILES = ("metrics.jsonl", "rollouts.jsonl", TRAINING_ROLLOUTS, "config.yaml")

# What a run writes, and what start_over moves aside. A logger's own files stay.
_FILES = ("step_*", LATEST, BEGAN, ".writing", "nonfinite_step_*", *_OWN_FILES)

# What an evaluation and a sampling write; there are results where the first of the files is.
EVALUATION_FILES = ("results.json", "rows.json", "rollouts.jsonl", EVALUATED)
SAMPLING_FILES = ("traces.jsonl", "metrics.jsonl")

# Open locks of this process, by file. A POSIX lock belongs to the process: its children do not hold it, and a kill releases it.
_locks: dict[Path, Any] = {}


def step_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"step_{step}"


def step_folders(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, the oldest first."""
    named = (path for path in output_dir.glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    return sorted((path for path in named if (path / STATE_FILE).is_file()), key=step_of)


def step_of(folder: Path) -> int:
    """Return N of `step_N`."""
    return int(folder.name.removeprefix("step_"))


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Return what `latest` points to; where it is missing or points to nothing, the newest step with a training state."""
    latest = output_dir / LATEST
    if (latest / STATE_FILE).is_file():
        # One link alone: `step_N` may itself be a link to another disk, and keeps its name.
        beside = output_dir / os.readlink(latest) if latest.is_symlink() else latest
        return beside if beside.parent == output_dir else latest.resolve()
    steps = step_folders(output_dir)
    if not steps:
        return None
    log.warning(f"{latest} holds no {STATE_FILE}; the newest checkpoint beside it is {steps[-1].name}, which is used")
    return steps[-1]


def holds_run(output_dir: Path) -> bool:
    """Return whether a run left checkpoints or metrics here. A run that never began leaves only a config.yaml."""
    metrics, latest = output_dir / "metrics.jsonl", output_dir / LATEST
    rows = metrics.is_file() and metrics.stat().st_size > 0
    return rows or os.path.lexists(latest) or bool(step_folders(output_dir))


def wants_resume(cfg: DictConfig) -> bool:
    """Return whether a checkpoint in the output folder is to be resumed. It stays what it was when the run began."""
    return cfg.get(RESUME) not in (None, False, "start_over")


def claim_run_folder(cfg: DictConfig, output_dir: Path) -> None:
    """Lock the folder of a training run, and refuse or move aside what a new run would overwrite; rank 0 calls this."""
    value = cfg.get(RESUME)
    if value not in (None, False, True, "auto", "start_over"):
        raise InputError(f"{RESUME}={value} is not one of false, true, auto, start_over")
    lock_folder(output_dir)
    _check_own_files(output_dir)
    if value == "start_over" and holds_run(output_dir):
        _move_aside(cfg, output_dir)
    elif not value and holds_run(output_dir):
        raise InputError(
            f"output_dir={output_dir} holds a run ({_summary(output_dir)}), which a new one would overwrite; set {RESUME}=true "
            f"(or auto) to continue it, {RESUME}=start_over to move its files to {output_dir}/previous_N and start, or another "
            "output_dir"
        )
    elif value and holds_run(output_dir):
        _say_changes(cfg, output_dir)


def refuse_training_run(output_dir: Path) -> None:
    """Refuse the folder of a training run to a recipe that trains nothing and would replace its config and its logs."""
    if os.path.lexists(output_dir / LATEST) or (output_dir / BEGAN).exists() or step_folders(output_dir):
        raise InputError(
            f"output_dir={output_dir} holds a training run ({_summary(output_dir)}), whose config.yaml and logs this one would "
            "overwrite; set another output_dir"
        )


def set_results_aside(cfg: DictConfig, output_dir: Path, names: Sequence[str]) -> None:
    """Move the results of another checkpoint or config to `previous_N`; those of the same ones are replaced. Rank 0 calls this.

    Args:
        names: EVALUATION_FILES or SAMPLING_FILES.
    """
    if not (output_dir / names[0]).is_file() or _has_same_origin(cfg, output_dir, names):
        return
    files = [path for name in (*names, "config.yaml") if (path := output_dir / name).is_file()]
    aside = free_name(output_dir / "previous")
    aside.mkdir()
    for path in files:
        os.replace(path, aside / path.name)
    if weights := _recorded_weights(aside):  # relative to the folder, which is one deeper now
        replace_file(aside / EVALUATED, json.dumps({"weights": os.path.join("..", weights)}).encode())
    log.warning(f"{output_dir} holds {names[0]} of another checkpoint or config; its {len(files)} files were moved to {aside}")


def _has_same_origin(cfg: DictConfig, output_dir: Path, names: Sequence[str]) -> bool:
    """Return whether results come from the config, and from the folder to which a link such as `latest` leads now.

    A sampling records no folder: the same config samples again in its place.
    """
    recorded, path = read_config(output_dir), cfg.get("adapter_dir") or cfg.checkpointer.get("checkpoint_dir")
    if recorded is None or OmegaConf.to_container(recorded, resolve=False) != public_config(cfg):
        return False
    if EVALUATED not in names:
        return True
    weights = _recorded_weights(output_dir)
    # Without its record, the results of a link may be those of any folder to which it has led.
    return path is None or os.path.realpath(path) == (
        os.path.abspath(path) if weights is None else os.path.realpath(output_dir / weights)
    )


def _recorded_weights(output_dir: Path) -> str | None:
    """Return the folder of the weights that an evaluation answered with, relative to the evaluation's own; None without one."""
    try:
        found = json.loads((output_dir / EVALUATED).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or cut off by a kill
        return None
    return found.get("weights") if isinstance(found, dict) else None


def lock_folder(output_dir: Path) -> None:
    """Take the folder for this process until it ends, by any cause; refuse one that another process has."""
    path = (output_dir / LOCK).absolute()
    if path in _locks:
        return
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:  # a folder, or a link, which could lead to any file
        raise InputError(f"{path} cannot be used to lock the run's folder ({error.strerror}); remove it") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            log.warning(f"{output_dir} cannot be locked ({error.strerror}): nothing keeps a second run out of it")
            return
        owner = file.read().strip() or "unknown"
        raise InputError(
            f"output_dir={output_dir} is in use by another run (process {owner}); wait for it, stop it, or set another one"
        ) from error
    file.truncate(0)
    file.seek(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _locks[path] = file


def _check_own_files(output_dir: Path) -> None:
    """Refuse a folder, or a link to nothing, in the place of a file that the run writes."""
    for path in (output_dir / name for name in _OWN_FILES):
        if os.path.lexists(path) and not path.is_file():
            kind = "a link that leads to no file" if path.is_symlink() else "not a file"
            raise InputError(f"{path} is {kind}, and the run writes a file there; remove it, or set another output_dir")


def read_config(output_dir: Path) -> DictConfig | None:
    """Return the config that the run was last started with, interpolations as written; None where it cannot be read."""
    try:
        found = OmegaConf.load(output_dir / "config.yaml")
    except Exception:  # absent or broken: it then says nothing, and no training depends on it
        return None
    return found if isinstance(found, DictConfig) else None


def _summary(output_dir: Path) -> str:
    steps = step_folders(output_dir)
    return f"newest checkpoint {steps[-1].name}" if steps else "without a checkpoint"


def _move_aside(cfg: DictConfig, output_dir: Path) -> None:
    files = [path for pattern in _FILES for path in sorted(output_dir.glob(pattern))]
    for key in ("checkpointer", "teacher_checkpointer"):
        source = Path((cfg.get(key) or {}).get("checkpoint_dir") or "/").absolute()
        inside = [path for path in files if source == path.absolute() or path.absolute() in source.parents]
        if inside:
            raise InputError(
                f"{key}.checkpoint_dir={source} lies in {inside[0]}, which {RESUME}=start_over moves; set another output_dir"
            )
    aside = free_name(output_dir / "previous")
    aside.mkdir()
    for path in files:
        os.replace(path, aside / path.name)
    log.warning(f"{len(files)} files and folders of the run in {output_dir} were moved to {aside}")


def _say_changes(cfg: DictConfig, output_dir: Path) -> None:
    """Log once which settings differ from those that the run was last started with."""
    recorded = read_config(output_dir)
    if recorded is None:
        return
    before = dict(_leaves(OmegaConf.to_container(recorded, resolve=False)))
    now = dict(_leaves(public_config(cfg)))
    names = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name) and name != RESUME]
    if names:
        changes = ", ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in sorted(names))
        log.warning(f"the run in {output_dir} is resumed with changed settings: {changes}")


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


# ---------------------------------------------------------------------------------------------- secrets


def public_config(cfg: DictConfig) -> dict[str, Any]:
    """Return the config with its interpolations resolved, but for those whose value comes from the environment.

    `${oc.env:API_KEY}` stays as it is written, also where another key refers to it: files and logs are shared, a key is not.
    """
    raw, resolved = (OmegaConf.to_container(cfg, resolve=resolve) for resolve in (False, True))
    return _public(raw, resolved, _secrets(raw, resolved))


def record_config(cfg: DictConfig, output_dir: Path) -> None:
    """Write the public config into the folder of its run; rank 0 calls this."""
    replace_file(output_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(public_config(cfg))).encode())


def log_config(cfg: DictConfig, recipe: str) -> None:
    """Log the public config once, as torchtune's ``log_config`` does with a resolved one."""
    if os.environ.get("RANK", "0") == "0":
        log.info(f"Running {recipe} with resolved config:\n\n{OmegaConf.to_yaml(public_config(cfg), sort_keys=True)}")


def _secrets(raw: Any, resolved: Any) -> set[str]:
    values = dict(_leaves(resolved))
    return {str(values[name]) for name, text in _leaves(raw) if _reads_environment(text) and str(values.get(name, ""))}


def _reads_environment(text: Any) -> bool:
    return isinstance(text, str) and re.search(r"\$\{\s*oc\.env\s*:", text) is not None


def _public(raw: Any, resolved: Any, secrets: set[str]) -> Any:
    if isinstance(raw, dict):
        return {key: _public(value, resolved[key], secrets) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_public(value, other, secrets) for value, other in zip(raw, resolved, strict=True)]
    interpolated = isinstance(raw, str) and "${" in raw
    if interpolated and (_reads_environment(raw) or any(secret in str(resolved) for secret in secrets)):
        return raw
    return resolved
