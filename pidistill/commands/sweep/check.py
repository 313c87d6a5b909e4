"""Check every run of a sweep before the first one starts, as the recipe does: keys, numbers, components, first checkpoint."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pidistill.commands.places import keys_of_recipe, recipe_of
from pidistill.commands.plan.reading import merged
from pidistill.commands.sweep.cells import (
    CHECKPOINT_KEY,
    SELECT,
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
from pidistill.config import COMPONENT, build
from pidistill.errors import InputError
from pidistill.training import metrics
from pidistill.training.checkpoint_source import check_checkpoint_folder
from pidistill.training.compatibility import build_objective
from pidistill.training.start import check_run


def check_cells(sweep: Sweep, search: str, *, with_checkpoints: bool = True) -> None:
    """Raise one sentence that names the first cell whose training or evaluation a recipe would refuse.

    Without ``with_checkpoints``, the checkpoints that the sweep starts from need not exist yet.
    """
    known = keys_of_recipe(recipe_of(sweep.evaluate)) if sweep.evaluate else None
    if known is not None and "views" not in known[0]:
        raise InputError(
            f"--evaluate {sweep.evaluate} is no config of an evaluation, so nothing was started; name one whose recipe is "
            "evaluate_distributed, such as tiny/evaluate"
        )
    made = sweep.output_dir if with_checkpoints else None
    checked: set[Path] = set()
    cells = grid_cells(sweep) if search == "grid" else list(_corner_cells(sweep))
    for cell in cells:
        runs = {run.folder: run for run in stage_runs(sweep, cell)}
        for folder in runs.keys() - checked:
            _check(f"cell {cell.id}", runs[folder].stage.config, _words(runs[folder]), made)
        checked |= runs.keys()
    for arm in sweep.arms if sweep.evaluate else ():
        start = str(sweep.output_dir / "latest") if arm.stages else arm.base
        overrides = {CHECKPOINT_KEY: start, **evaluate_overrides(sweep, arm), "output_dir": "runs"}
        words = [f"{key}={value}" for key, value in overrides.items()]
        _check(f"the evaluation of arm {arm.name}", sweep.evaluate, words, made)
    last = _last_configs(sweep, cells)
    _check_select(sweep, last, search)
    if sweep.evaluate:
        _warn_of_shared_rows(sweep, {name: cfg for name, (_, cfg) in last.items()})


def _last_configs(sweep: Sweep, cells: Sequence[Cell]) -> dict[str, tuple[str, DictConfig]]:
    """Return (name of the config, config with overrides) of the last stage of each arm's first cell."""
    last = {cell.arm.name: list(stage_runs(sweep, cell))[-1] for cell in reversed(cells) if cell.arm.stages}
    return {name: (run.stage.config, merged(run.stage.config, _words(run))) for name, run in last.items()}


def _check_select(sweep: Sweep, last: Mapping[str, tuple[str, DictConfig]], search: str) -> None:
    """Refuse a metric to choose by that no run writes: a wrong name, or an evaluation's where no evaluation is made.

    A grid needs none and has a default, so that one that was named is asked for alone; TPE needs it of every arm. Recipes and
    objectives of the user may write metrics of their own.
    """
    recipes = [recipe_of(config) for config, _ in last.values()]
    own_recipe = any(recipe.endswith(".py") or keys_of_recipe(recipe) is None for recipe in recipes)
    words = set(re.findall(r"[a-z][a-z0-9_]*", metrics.__doc__ or ""))
    words |= {word.replace("sampler_mismatch", "rollout_lag") for word in words}
    name = re.sub(r"_q[2-4]$", "_q1", sweep.select.partition("/")[0])
    if own_recipe or not words:
        return
    of_evaluation = name.startswith("eval_")
    own_objective = any(_has_own_component(cfg.get("objective")) for _, cfg in last.values())
    if name not in words and (of_evaluation or not own_objective):
        known = sorted(word for word in words if word.startswith("eval_") or ("_" in word and not of_evaluation))
        closest = difflib.get_close_matches(name, known, n=1, cutoff=0.5 if of_evaluation else 0.85)
        if of_evaluation or closest:
            raise InputError(
                f"select={sweep.select} is no metric of a run, so nothing was started; "
                f"{f'did you mean {closest[0]}?' if closest else 'the metrics are listed in pidistill/training/metrics.py'}"
            )
    without = [arm for arm, (_, cfg) in last.items() if not (cfg.get("eval_dataset") or {}).get(COMPONENT)]
    if of_evaluation and without and (search == "tpe" or (len(without) == len(last) and sweep.select != SELECT)):
        told = f"{', '.join(without)}: select={sweep.select} is measured on `eval_dataset`, which the config lacks"
        advice = "add eval_dataset, or set --select to a metric of the training, such as success_frac"
        if search == "tpe":
            raise InputError(f"{told}, so nothing was started; {advice}")
        print_line(f"{told}, so that nothing can be chosen by it; {advice}")  # one arm of a file may run alone


def _has_own_component(node: Any) -> bool:
    """Return whether a config node names a component of the user at any depth."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, list):
        return any(map(_has_own_component, node))
    if not isinstance(node, dict):
        return False
    own = isinstance(node.get(COMPONENT), str) and not node[COMPONENT].startswith("pidistill.")
    return own or any(map(_has_own_component, node.values()))


def _warn_of_shared_rows(sweep: Sweep, last: Mapping[str, DictConfig]) -> None:
    """Say which arms draw their validation rows from the same part of the same source as the sweep's evaluation."""
    arms = {arm.name: arm for arm in sweep.arms}
    shared = []
    for name, cfg in last.items():
        judged = [f"{key}={value}" for key, value in evaluate_overrides(sweep, arms[name]).items()]
        validation = _rows_of(cfg, "eval_dataset")
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


def _check(what: str, config: str, words: Sequence[str], made: Path | None) -> None:
    """Check one run; a checkpoint inside the folder ``made`` is an earlier stage's. It need not exist yet, nor any for None."""
    try:
        known = keys_of_recipe(recipe_of(config))
        cfg = merged(config, words)
        if known is None:
            return
        check_run(cfg, *known)
        if cfg.get("privileged"):  # like the objective it refuses wrong values when it is built
            build(cfg.privileged)
        if cfg.get("objective"):
            build_objective(cfg)
        exists = made is not None and made not in Path(cfg.checkpointer.checkpoint_dir).parents
        if exists and not cfg.get("fallback_checkpoint_dir"):
            check_checkpoint_folder(cfg, "checkpointer")
    except InputError as error:
        raise InputError(f"{what} cannot run, so nothing was started: {error}") from error
