"""Search cells by grid, at random or by TPE, with Optuna's SQLite storage `OUTPUT/study.db` as the list of what is taken.

A grid's cells are queued once as trials that workers take; a random or TPE trial is asked for when a worker is free. Whoever
works on a trial holds its lock, so that a trial marked as running whose lock is free is a dead worker's, and is taken over.
"""

import json
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from pidistill.commands.sweep.cells import (
    Arm,
    Cell,
    Sweep,
    grid_cells,
    make_cell,
    short_hash,
    stage_fingerprint,
    stage_runs,
    with_overrides,
)
from pidistill.commands.sweep.check import check_cells
from pidistill.commands.sweep.execute import (
    LOOKS_EVERY_S,
    cell_fingerprint,
    locked,
    print_line,
    read_record,
    run_cell,
    sigterm_raises,
    try_lock,
)
from pidistill.commands.sweep.results import append_result, read_results, write_order
from pidistill.commands.sweep.values import Axis, Choices
from pidistill.errors import InputError, check_choice
from pidistill.training.start import make_output_dir

SEARCHES = ("grid", "random", "tpe")
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class SweepPlan:
    """Hold a sweep and how it is searched; ``trials`` counts per arm, and not for a grid."""

    sweep: Sweep
    search: str = "grid"
    trials: int | None = None


def check_plan(plan: SweepPlan) -> None:
    check_choice("--search", plan.search, SEARCHES)
    if plan.search == "grid" and plan.trials is not None:
        raise InputError(
            "--trials counts the trials of random and tpe, and a grid runs all of its cells; remove it, or set --search random"
        )
    if plan.search != "grid" and (not plan.trials or plan.trials < 1 or not plan.sweep.axes):
        raise InputError(
            f"--search {plan.search} needs --trials of at least 1 and a key to search, such as objective.beta=0.0..1.0"
        )


def run_sweep(plan: SweepPlan, workers: int = 1) -> bool:
    """Run what is not yet done, with this process or with ``workers`` started from here; others may join in the same folder.

    Every cell is checked before the first one starts. Return True if no cell of this sweep failed and no worker ended early.
    """
    check_plan(plan)
    check_cells(plan.sweep, plan.search)
    make_output_dir(str(plan.sweep.output_dir))
    write_order(plan.sweep.output_dir, plan.sweep.order)
    if plan.search == "grid":
        enrol(plan.sweep)
    if workers == 1:
        work(plan)
        return not _failed_cells(plan)
    ended_badly = [code for code in run_processes(work, (plan,), workers) if code]
    if ended_badly:
        print_line(f"{len(ended_badly)} of {workers} workers ended early (exit codes {ended_badly}); run the command again")
    return not ended_badly and not _failed_cells(plan)


def run_processes(target: Callable[..., None], args: tuple[Any, ...], count: int) -> list[int | None]:
    """Run ``target`` in ``count`` processes; return their exit codes. A signal to this process ends them too."""
    context = multiprocessing.get_context("spawn")  # a fork would share SQLite's connections
    processes = [context.Process(target=_leave_sigint_to_parent, args=(target, *args)) for _ in range(count)]
    with sigterm_raises():
        try:
            for process in processes:
                process.start()
            for process in processes:
                while process.is_alive():
                    process.join(LOOKS_EVERY_S)
        except BaseException:  # SystemExit of a signal, and KeyboardInterrupt
            for process in processes:
                if process.is_alive():
                    process.terminate()
            for process in processes:
                if process.pid is not None:
                    process.join()
            raise
    return [process.exitcode for process in processes]


def _leave_sigint_to_parent(target: Callable[..., None], *args: Any) -> None:
    """Run ``target`` without an answer to SIGINT, which a terminal sends to all: the parent then sends SIGTERM.

    An empty handler, since a signal that is ignored would be ignored by the runs, too.
    """
    signal.signal(signal.SIGINT, lambda number, frame: None)
    target(*args)


def _failed_cells(plan: SweepPlan) -> list[str]:
    """List the failed cells of this sweep: of a grid its own cells, of a search all cells of its arms."""
    rows = read_results(plan.sweep.output_dir)
    arms = {arm.name for arm in plan.sweep.arms}
    own = {cell.id for cell in grid_cells(plan.sweep)} if plan.search == "grid" else rows
    return [cell for cell, row in rows.items() if cell in own and row["arm"] in arms and row["status"] != "ok"]


def work(plan: SweepPlan) -> None:
    with sigterm_raises():
        _work(plan)


def _work(plan: SweepPlan) -> None:
    if plan.search == "grid":
        begin, before = time.perf_counter(), count_finished(plan.sweep)
        while work_on_a_cell(plan.sweep):
            print_line(progress_line(plan.sweep, before, time.perf_counter() - begin))
        return
    for arm in plan.sweep.arms:
        if not arm.stages:
            finish_cell(plan.sweep, make_cell(plan.sweep, arm, {}, None))
            continue
        while work_on_a_trial(plan, arm):
            pass


def count_finished(sweep: Sweep) -> int:
    """Count the cells of a grid that ended well, whichever worker ran them."""
    rows = read_results(sweep.output_dir)
    return sum(rows.get(cell.id, {}).get("status") == "ok" for cell in grid_cells(sweep))


def progress_line(sweep: Sweep, before: int, seconds: float) -> str:
    """Say how many cells ended well and how long the others will take, where ``before`` had ended well ``seconds`` ago.

    The pace is that of all workers on the folder together.
    """
    done, total = count_finished(sweep), len(grid_cells(sweep))
    if done == total or done <= before:
        return f"{done} of {total} cells finished"
    left = timedelta(seconds=round(seconds / (done - before) * (total - done)))
    return f"{done} of {total} cells finished, about {left} left"


def open_study(sweep: Sweep, name: str, sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    """Open the study, under the sweep's lock: two processes that make the tables at once would disturb each other."""
    engine = {"connect_args": {"timeout": 120}}
    storage = optuna.storages.RDBStorage(f"sqlite:///{sweep.output_dir / 'study.db'}", engine_kwargs=engine)
    return optuna.create_study(storage=storage, study_name=name, sampler=sampler, direction="maximize", load_if_exists=True)


def claim(sweep: Sweep, study: optuna.Study, trial: FrozenTrial) -> Any:
    """Return the trial's lock if it is ours now, else None. A running trial can be ours only if its worker is dead."""
    lock = try_lock(sweep.output_dir, f"{study.study_name}-{trial.number}")
    if lock is not None and trial.state == TrialState.WAITING:
        study._storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING)  # as Study.ask() does
    elif lock is not None:
        print_line(f"trial {trial.number} was left by a worker that is gone; taken over")
    return lock


def finish_cell(sweep: Sweep, cell: Cell) -> dict[str, Any]:
    """Return the cell's row: the one that is there if nothing has changed since, else that of a new attempt."""
    with locked(sweep.output_dir, f"cell {cell.id}"):
        row = finished_row(sweep, cell)
        if row is None:
            before = read_results(sweep.output_dir).get(cell.id, {})
            row = run_cell(sweep, cell)
            if not sweep.evaluate and row["stages"] == before.get("stages"):  # the same runs, which were evaluated before
                kept = ("last", "best") if row["select"] == before["select"] else ("last",)
                row |= {key: before[key] for key in kept if key in before}
            with locked(sweep.output_dir, "results"):
                append_result(sweep.output_dir, row)
        return row


def finished_row(sweep: Sweep, cell: Cell) -> dict[str, Any] | None:
    row = read_results(sweep.output_dir).get(cell.id)
    if row is None or row["status"] != "ok":
        return None
    if row["fingerprint"] != cell_fingerprint(sweep, cell):
        print_line(f"{cell.id}: {_what_differs(sweep, cell, row)}")
        return None
    return row


def _what_differs(sweep: Sweep, cell: Cell, row: dict[str, Any]) -> str:
    """Return what a command asks of a finished cell that its row does not have, and what is done again."""
    runs = list(stage_runs(sweep, cell))
    if any(read_record(run.folder).get("fingerprint") != run.fingerprint for run in runs):
        return "its config has changed since it was finished; it is run again"
    if row["select"] != sweep.select:
        return f"it was selected by {row['select']}, and now by {sweep.select}; its runs are kept"
    if not sweep.evaluate:
        return "it was evaluated, and this command has no --evaluate; its runs and their numbers are kept"
    what = "runs are kept and evaluated" if runs else "checkpoint is evaluated"
    return f"its evaluation is new or has changed since it was finished; its {what}"


# ------------------------------------------------------------------------------------------- grid


def enrol(sweep: Sweep) -> None:
    """Queue every cell of the grid that is neither finished nor queued; a failed one is queued again."""
    cells = grid_cells(sweep)
    with locked(sweep.output_dir, "sweep"):
        study = open_study(sweep, "grid")
        waiting = {trial.user_attrs["cell"] for trial in study.trials if not trial.state.is_finished()}
        finished = [cell for cell in cells if finished_row(sweep, cell) is not None]
        for cell in cells:
            if cell not in finished and cell.id not in waiting:
                study.enqueue_trial({}, user_attrs={"cell": cell.id})
    print_line(f"{len(cells)} cells, {len(finished)} of them finished before; {sweep.output_dir}")


def work_on_a_cell(sweep: Sweep) -> bool:
    """Take the next queued cell of this sweep and finish it; False if there is none to take."""
    cells = {cell.id: cell for cell in grid_cells(sweep)}
    with locked(sweep.output_dir, "sweep"):
        study = open_study(sweep, "grid")
        for trial in study.trials:
            # A queue may hold cells of another command on this folder; those are that command's.
            if trial.state.is_finished() or trial.user_attrs["cell"] not in cells:
                continue
            lock = claim(sweep, study, trial)
            if lock is not None:
                break
        else:
            return False
    with lock:
        row = finish_cell(sweep, cells[trial.user_attrs["cell"]])
        value = (row.get("validation") or {}).get("last")
        if row["status"] != "ok":
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        elif value is None:  # finished, but Optuna has no "complete without a value"
            study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            study.tell(trial.number, value, skip_if_finished=True)
    return True


# ------------------------------------------------------------------------------------------- random and TPE


def distribution(axis: Axis) -> BaseDistribution:
    if isinstance(axis, Choices):
        return CategoricalDistribution(axis.values)
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def study_name(plan: SweepPlan, arm: Arm) -> str:
    """Return a study's name, which holds arm, base, configs, space and seeds: trials that differ in these do not compare."""
    sweep = plan.sweep
    marks = [stage_fingerprint(stage, {}) for stage in with_overrides(arm, sweep.fixed).stages]
    space = sorted((key, repr(axis)) for key, axis in sweep.axes.items())
    name = " ".join(filter(None, [plan.search, arm.name, arm.base_name]))
    return f"{name} {short_hash(json.dumps([marks, space, sweep.seeds, sweep.select, arm.name]))}"


def sampler(plan: SweepPlan, asked: int) -> optuna.samplers.BaseSampler:
    """Return a sampler of its own for a trial, seeded by its number: several workers would otherwise draw the same values."""
    if plan.search == "random":
        return optuna.samplers.RandomSampler(seed=asked)
    return optuna.samplers.TPESampler(seed=asked, constant_liar=True)  # trials that run elsewhere count as bad: spread out


def work_on_a_trial(plan: SweepPlan, arm: Arm) -> bool:
    """Take over or ask for a trial of one arm, run its cells (one per seed) and tell the mean; False if all are taken."""
    sweep = plan.sweep
    with locked(sweep.output_dir, "sweep"):
        taken = next_trial(plan, arm)
    if taken is None:
        return False
    study, number, params, lock = taken
    with lock:
        settings = {key: setting_text(value) for key, value in params.items()}
        value = mean_validation([finish_cell(sweep, make_cell(sweep, arm, settings, seed)) for seed in sweep.seeds])
        if value is None:
            study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        else:
            study.tell(number, value, skip_if_finished=True)
    return True


def next_trial(plan: SweepPlan, arm: Arm) -> tuple[optuna.Study, int, dict[str, Any], Any] | None:
    name = study_name(plan, arm)
    study = open_study(plan.sweep, name)
    trials = study.trials
    if not trials:
        _say_if_changed(plan, arm, study)
    for trial in trials:
        if trial.state == TrialState.RUNNING and (lock := claim(plan.sweep, study, trial)) is not None:
            if trial.params.keys() == plan.sweep.axes.keys():
                return study, trial.number, trial.params, lock
            # Its worker died while the values were drawn.
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    if len(trials) >= (plan.trials or 0):
        return None
    study = open_study(plan.sweep, name, sampler(plan, len(trials)))
    asked = study.ask({key: distribution(axis) for key, axis in sorted(plan.sweep.axes.items())})
    return study, asked.number, asked.params, try_lock(plan.sweep.output_dir, f"{name}-{asked.number}")


def _say_if_changed(plan: SweepPlan, arm: Arm, study: optuna.Study) -> None:
    prefix = study.study_name.rsplit(" ", 1)[0]
    others = [name for name in optuna.get_all_study_names(study._storage) if name.rsplit(" ", 1)[0] == prefix]
    if len(others) > 1:
        print_line(
            f"{arm.name}: config, space or seeds have changed since the last search here; this one starts from the beginning"
        )


def setting_text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def mean_validation(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the metric at the last evaluation of each run, mean over seeds, without picking peaks; None if unknown."""
    values = [(row.get("validation") or {}).get("last") for row in rows if row["status"] == "ok"]
    return statistics.fmean(values) if len(values) == len(rows) and None not in values else None
