"""Check the checkpoint folders that a run starts from: that they exist, are complete, and hold the model of the config."""

import os
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torchtune import utils
from torchtune.training.checkpointing._utils import FormattedCheckpointFiles

from pidistill.errors import InputError, one_line
from pidistill.models.empty import shared_empty_model
from pidistill.models.fits import check_fits
from pidistill.training.disk import check_copyable
from pidistill.training.run_folder import read_config, wants_resume

log = utils.get_logger("INFO")


def use_fallback_checkpoint(cfg: DictConfig) -> None:
    """Put `fallback_checkpoint_dir` in the place of a `checkpointer.checkpoint_dir` that does not exist, and say so.

    This serves methods of several stages: a later stage starts from the base if the earlier one was not run. A resumed run
    keeps the folder that it began with, which the config.yaml in its output folder records: its frozen teacher and the weights
    that training began with stay the same, even if other folders were made since.
    """
    fallback = cfg.get("fallback_checkpoint_dir")
    if fallback is None:
        return
    folder = cfg.checkpointer.checkpoint_dir
    began_with = _recorded_checkpoint_dir(cfg) if wants_resume(cfg) else None
    missing = not Path(folder).is_dir() and began_with != folder
    if folder != fallback and (began_with == fallback or missing):
        if os.environ.get("RANK", "0") == "0":
            why = "the run began there" if began_with == fallback else f"{folder} does not exist: the stage before was not run"
            log.warning(f"starting from fallback_checkpoint_dir {fallback}, since {why}")
        cfg.checkpointer.checkpoint_dir = fallback


def _recorded_checkpoint_dir(cfg: DictConfig) -> str | None:
    """Return the checkpoint folder of the run's own config.yaml; None where there is none, or it cannot be read."""
    recorded = read_config(Path(cfg.output_dir))
    return None if recorded is None else OmegaConf.select(recorded, "checkpointer.checkpoint_dir")


def check_checkpoint_folder(cfg: DictConfig, key: str) -> None:
    """Refuse a checkpoint folder that lacks its files before anything is loaded."""
    node = cfg.get(key)
    if node is None or "checkpoint_dir" not in node or not (_in_hf_format(node) or "checkpoint_files" in node):
        return
    folder = Path(node.checkpoint_dir)
    hint = f"{_how_to_make(folder)}check {key}.checkpoint_dir"
    if folder.parts[-4:] == ("runs", "tiny", "base", "latest"):
        hint = "run `make base` (or `pidistill run sft_distributed --config tiny/base`) first"
    if not folder.is_dir():
        raise InputError(f"checkpoint folder {folder} does not exist; {hint}")
    if node.get("checkpoint_files") is not None and not _checkpoint_files(node):
        raise InputError(f"{key}.checkpoint_files is empty; list the files that hold the weights")
    if key == "checkpointer" and _in_hf_format(node):
        check_copyable(folder)
    for name in [*(["config.json"] if _in_hf_format(node) else []), *_checkpoint_files(node)]:
        if not (folder / name).is_file():
            present = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise InputError(
                f"checkpoint folder {folder} has no {name} (it holds {present}); {hint}, or check {key}.checkpoint_files"
            )


def _how_to_make(folder: Path) -> str:
    """Return a hint where the folder is what the run of a bundled config leaves, runs/<config>/latest, or a name on the Hub."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and folder.parts[0] not in ("runs", "..", "."):
        return f"a name on the Hub must be a folder here (`tune download {folder} --output-dir FOLDER`): "
    found = re.search(r"(?:^|/)runs/([^/]+/[^/]+)/latest$", folder.as_posix())
    package = Path(__file__).resolve().parents[1]
    bundled = any((root / "configs" / f"{found[1]}.yaml").is_file() for root in (package, package.parent)) if found else False
    return f"it is what configs/{found[1]}.yaml leaves: run that first, or " if bundled else ""


def check_checkpoint_fits(cfg: DictConfig, key: str) -> None:
    """Refuse a folder of another model than the config builds, from its config.json and its tensors' names and shapes."""
    node = cfg.get(key)
    if node is not None and _in_hf_format(node):
        model = (cfg.get("teacher_model") if key == "teacher_checkpointer" else None) or cfg.model
        files = {"checkpoint_files": _checkpoint_files(node)}
        try:
            check_fits(shared_empty_model(model), {**node, **files}, builder=str(model._component_), key=key)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"config.json in {node.checkpoint_dir} cannot be compared with {model._component_} "
                f"({type(error).__name__}: {one_line(error)}); check the file, or {key}.checkpoint_dir"
            ) from error


def _in_hf_format(node: DictConfig) -> bool:
    return str(node.get("_component_")).endswith("HFCheckpointer")


def _checkpoint_files(node: DictConfig) -> list[str]:
    """Return the files that the config names; none where the folder's index names them."""
    files = node.get("checkpoint_files")
    if isinstance(files, DictConfig):  # torchtune's {filename_format, max_filename}
        return FormattedCheckpointFiles.from_dict(dict(files)).build_checkpoint_filenames()
    return list(files or [])
