"""`pidistill demo`: compare methods with the RL control at equal rollouts on the tiny world, from one base, on held-out tasks.

The sweep `configs/sweeps/demo.yaml`: trains each arm with its bundled config, evaluates base and arms on the test split
(nothing was selected on it), and leaves tables and pictures in the terminal and the output folder.
"""

import sys
import time
from pathlib import Path

from pidistill.commands.common import Parser, exit_on_input_error
from pidistill.commands.sweep.cells import read_sweep
from pidistill.commands.sweep.command import report
from pidistill.commands.sweep.search import SweepPlan, run_sweep

SWEEP = "sweeps/demo"


def main(argv: list[str]) -> None:
    parser = Parser(prog="pidistill demo", description=__doc__)
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--arms", nargs="+", default=["pi_distill", "rl"])
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--max-steps", type=int, help="of every arm, in place of what its config says")
    arguments = parser.parse_args(argv)
    words = [] if arguments.max_steps is None else [f"max_steps={arguments.max_steps}"]
    begin = time.perf_counter()
    with exit_on_input_error():
        chosen = {key: getattr(arguments, key) for key in ("output_dir", "base", "seeds")}
        sweep = read_sweep(SWEEP, words, arms=["base", *arguments.arms], **chosen)
        ended_well = run_sweep(SweepPlan(sweep))
        report(sweep.output_dir)
    print(f"{time.perf_counter() - begin:.0f} s")
    if not ended_well:
        sys.exit(1)
