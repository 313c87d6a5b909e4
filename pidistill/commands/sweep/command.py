"""`pidistill sweep`: run cells of a config, of several, or of a sweep file, each a plain `pidistill run` with overrides.

pidistill sweep tiny/pi_distill objective.beta=0.25,1 objective.alpha=0,0.5,1 seed=0..2 --evaluate tiny/evaluate
pidistill sweep tiny/opsd objective.beta=log:0.1..10.0 seed=0,1 --search tpe --trials 20 --workers 2
pidistill sweep configs/sweeps/methods.yaml --arms rl pi_distill
pidistill sweep --report runs/sweeps/methods

Values: `a,b,c`; `a..b` with whole numbers (both included); for random and tpe also `0.0..1.0` and `log:1e-5..1e-2`. `seed` is
never searched: every setting runs with all seeds. Several of these commands can work on the folder at once, and the same
command continues where it was stopped. All cells are checked before the first one starts. Ends with status 0 if every
cell ended well, 1 if one failed, 2 if the command or a config is wrong.
"""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pidistill.commands.common import config_parser, exit_on_input_error, parse_with_overrides
from pidistill.commands.report.command import write_report as write_page
from pidistill.commands.sweep.cells import Sweep, grid_cells, read_sweep, stage_runs
from pidistill.commands.sweep.check import check_cells
from pidistill.commands.sweep.pictures import draw
from pidistill.commands.sweep.results import read_results, write_report
from pidistill.commands.sweep.search import SEARCHES, SweepPlan, check_plan, run_sweep
from pidistill.components import closest
from pidistill.errors import InputError, check_count


def parser() -> argparse.ArgumentParser:
    what = "a bundled config, a path, several with commas between, or a sweep file"
    made = config_parser("sweep", __doc__, what, nargs="?")
    made.add_argument("--search", choices=SEARCHES, default="grid")
    made.add_argument("--trials", type=int, help="of random and tpe search, per arm")
    made.add_argument("--workers", type=int, default=1, help="processes to start")
    made.add_argument("--output-dir", type=Path, help="default: runs/sweeps/NAME")
    made.add_argument("--arms", nargs="+", help="of a sweep file")
    made.add_argument("--seeds", nargs="+", type=int)
    made.add_argument("--base", nargs="+", help="checkpoint that first stages start from; several: each arm from each")
    made.add_argument("--evaluate", metavar="CONFIG", help="evaluates each cell on the held-out split, such as tiny/evaluate")
    made.add_argument("--select", metavar="METRIC", help="validation metric (more is better); default eval_student_success")
    made.add_argument("--dry-run", action="store_true", help="check a grid, print its commands and stop")
    made.add_argument("--against", metavar="ARM", help="arm that others are compared with, task by task; default: the first")
    made.add_argument("--report", type=Path, metavar="OUTPUT", help="only make the tables and pictures of this sweep again")
    return made


def main(argv: list[str]) -> None:
    with exit_on_input_error():
        run(parse_with_overrides(parser(), argv))


def run(arguments: argparse.Namespace) -> None:
    """Run a sweep and report it, or do the one of the two that is asked for."""
    if arguments.report is not None:
        report(arguments.report, arguments.against)
        return
    if arguments.config is None:
        raise InputError("name a config or a sweep file; `pidistill sweep --help` shows how")
    check_count("--workers", arguments.workers)
    chosen = {key: getattr(arguments, key) for key in ("output_dir", "arms", "seeds", "base", "evaluate", "select")}
    sweep = read_sweep(arguments.config, arguments.overrides, **chosen)
    _check_against(arguments.against, sweep.output_dir, [arm.name for arm in sweep.arms])
    plan = SweepPlan(sweep, arguments.search, arguments.trials)
    if arguments.dry_run:
        if arguments.search != "grid":
            raise InputError("--dry-run prints a grid's commands; a random or TPE search draws its values while it runs")
        check_plan(plan)
        with contextlib.redirect_stdout(sys.stderr):  # warnings; what is printed can be piped to a shell
            check_cells(sweep, arguments.search, with_checkpoints=False)
        print("\n".join(commands(sweep)))
        return
    ended_well = run_sweep(plan, arguments.workers)
    report(sweep.output_dir, arguments.against)
    if not ended_well:
        sys.exit(1)


def _check_against(against: str | None, output_dir: Path, names: Sequence[str]) -> None:
    known = list(dict.fromkeys([*names, *(row["arm"] for row in read_results(output_dir).values())]))
    if against is not None and against not in known:
        raise InputError(f"--against {against} is no arm here{closest(against, known)}")


def commands(sweep: Sweep) -> list[str]:
    """Return each training command of a grid once."""
    return list(dict.fromkeys(shlex.join(run.command) for cell in grid_cells(sweep) for run in stage_runs(sweep, cell)))


def report(output_dir: Path, against: str | None = None) -> None:
    """Print the tables, and write them to results.md with pictures and a page of the runs beside it."""
    if not read_results(output_dir):
        raise InputError(f"{output_dir} has no results.jsonl; run the sweep first, or check the name of the folder")
    _check_against(against, output_dir, [])
    rows = write_report(output_dir, against)
    print(*[output_dir / "results.md", *draw(output_dir, rows), write_page([output_dir])], sep="\n")
