"""Check every run of a sweep before the first one starts: its keys, numbers and components, as the recipe itself does."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pidistill.commands.places import keys_of_recipe, recipe_of
from pidistill.commands.plan.reading import merged
from pidistill.commands.sweep.cells import CHECKPOINT_KEY, Cell, StageRun, Sweep, grid_cells, make_cell, stage_runs
from pidistill.commands.sweep.values import Axis, Choices
from pidistill.errors import InputError
from pidistill.training.start import check_run


def check_cells(sweep: Sweep, search: str) -> None:
    """Raise one sentence that names the first cell whose training or evaluation a recipe would refuse."""
    checked: set[Path] = set()
    for cell in grid_cells(sweep) if search == "grid" else _corner_cells(sweep):
        runs = {run.folder: run for run in stage_runs(sweep, cell)}
        for folder in runs.keys() - checked:
            _check(f"cell {cell.id}", runs[folder].stage.config, _words(runs[folder]))
        checked |= runs.keys()
    for arm in sweep.arms if sweep.evaluate else ():
        overrides = {**sweep.evaluate_overrides, **arm.evaluate_overrides, CHECKPOINT_KEY: "checkpoint", "output_dir": "runs"}
        _check(f"the evaluation of arm {arm.name}", sweep.evaluate, [f"{key}={value}" for key, value in overrides.items()])


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


def _check(what: str, config: str, words: Sequence[str]) -> None:
    try:
        known = keys_of_recipe(recipe_of(config))
        cfg = merged(config, words)
        if known is not None:
            check_run(cfg, *known)
    except InputError as error:
        raise InputError(f"{what} cannot run, so nothing was started: {error}") from error
