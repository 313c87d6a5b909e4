"""Check every run of a sweep before the first one starts, as the recipe does: keys, numbers, components, first checkpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pidistill.commands.places import keys_of_recipe, recipe_of
from pidistill.commands.plan.reading import merged
from pidistill.commands.sweep.cells import (
    CHECKPOINT_KEY,
    Cell,
    StageRun,
    Sweep,
    evaluate_overrides,
    grid_cells,
    make_cell,
    stage_runs,
)
from pidistill.commands.sweep.execute import print_line
from pidistill.commands.sweep.values import Axis, Choices
from pidistill.errors import InputError
from pidistill.training.checkpoint_source import check_checkpoint_folder
from pidistill.training.start import check_run


def check_cells(sweep: Sweep, search: str) -> None:
    """Raise one sentence that names the first cell whose training or evaluation a recipe would refuse."""
    known = keys_of_recipe(recipe_of(sweep.evaluate)) if sweep.evaluate else None
    if known is not None and "views" not in known[0]:
        raise InputError(
            f"--evaluate {sweep.evaluate} is no config of an evaluation, so nothing was started; name one whose recipe is "
            "evaluate_distributed, such as tiny/evaluate"
        )
    checked: set[Path] = set()
    cells = grid_cells(sweep) if search == "grid" else list(_corner_cells(sweep))
    for cell in cells:
        runs = {run.folder: run for run in stage_runs(sweep, cell)}
        for folder in runs.keys() - checked:
            _check(f"cell {cell.id}", runs[folder].stage.config, _words(runs[folder]), sweep.output_dir)
        checked |= runs.keys()
    for arm in sweep.arms if sweep.evaluate else ():
        start = str(sweep.output_dir / "latest") if arm.stages else arm.base
        overrides = {CHECKPOINT_KEY: start, **evaluate_overrides(sweep, arm), "output_dir": "runs"}
        words = [f"{key}={value}" for key, value in overrides.items()]
        _check(f"the evaluation of arm {arm.name}", sweep.evaluate, words, sweep.output_dir)
    if sweep.evaluate:
        _warn_of_shared_rows(sweep, cells)


def _warn_of_shared_rows(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Say which arms draw their validation rows from the same part of the same source as the sweep's evaluation."""
    last = {cell.arm.name: list(stage_runs(sweep, cell))[-1] for cell in reversed(cells) if cell.arm.stages}
    arms = {arm.name: arm for arm in sweep.arms}
    shared = []
    for name, run in last.items():
        judged = [f"{key}={value}" for key, value in evaluate_overrides(sweep, arms[name]).items()]
        validation = _rows_of(merged(run.stage.config, _words(run)), "eval_dataset")
        if validation is not None and validation == _rows_of(merged(str(sweep.evaluate), judged), "dataset"):
            shared.append(name)
    if shared:
        print_line(
            f"{', '.join(sorted(shared))}: `eval_dataset` reads the rows of the evaluation, so that what is chosen on "
            "validation is chosen on what judges it; give `eval_dataset` rows of its own"
        )


def _rows_of(cfg: DictConfig, key: str) -> dict | None:
    """Return what tells which rows a dataset's component reads, their number left out; None where that is not known."""
    try:
        node = OmegaConf.to_container(cfg, resolve=True).get(key)
    except OmegaConfBaseException:  # a value from the environment that is not set here
        return None
    other = ("max_rows", "n", "made_by", "privileged", "privileged_key")
    return {k: v for k, v in node.items() if k not in other} if isinstance(node, dict) else None


def _words(run: StageRun) -> list[str]:
    return run.command[run.command.index("--config") + 2 :]


def _corner_cells(sweep: Sweep) -> Iterator[Cell]:
    """Yield cells in which each searched key has each of its choices, or both ends of its range, once."""
    corners = {key: _corners(axis) for key, axis in sweep.axes.items()}
    first = {key: values[0] for key, values in corners.items()}
    for arm in sweep.arms:
        for key, values in corners.items():
            for value in values:
                yield make_cell(sweep, arm, first | {key: value}, sweep.seeds[0])


def _corners(axis: Axis) -> tuple[str, ...]:
    if isinstance(axis, Choices):
        return axis.values
    return tuple(str(int(end)) if axis.whole else f"{end:.6g}" for end in (axis.low, axis.high))


def _check(what: str, config: str, words: Sequence[str], output_dir: Path) -> None:
    """Check one run; a checkpoint inside ``output_dir`` is that of an earlier stage, which need not exist yet."""
    try:
        known = keys_of_recipe(recipe_of(config))
        cfg = merged(config, words)
        if known is None:
            return
        check_run(cfg, *known)
        if output_dir not in Path(cfg.checkpointer.checkpoint_dir).parents and not cfg.get("fallback_checkpoint_dir"):
            check_checkpoint_folder(cfg, "checkpointer")
    except InputError as error:
        raise InputError(f"{what} cannot run, so nothing was started: {error}") from error
