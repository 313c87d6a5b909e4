"""`pidistill demo`: π-Distill against RL at equal rollouts on the tiny world, from one base, on held-out tasks.

Trains both arms with their bundled configs, evaluates base and arms on the test split (nothing was selected on it), and
leaves a table in the terminal, results.json and results.png in the output folder.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from pidistill._cli import folders

ARMS = {"pi_distill": "pi_distill_distributed", "rl": "opsd_distributed"}
TITLES = {"base": "base", "rl": "RL (GRPO)", "pi_distill": "π-Distill α=.5"}
CURVES = {
    "eval_student_success_greedy": "success without PI (validation, greedy)",
    "leak_frac": "leak rate of the sampled rollouts",
    "kl_teacher_student_nats": "kl(teacher||student), nats per token",
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="pidistill demo", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--base", type=Path, default=Path("runs/tiny/base/latest"))
    parser.add_argument("--max-steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    begin = time.perf_counter()
    checkpoints = {"base": arguments.base}
    for arm, recipe in ARMS.items():
        output = arguments.output_dir / arm
        run_recipe(recipe, f"tiny/{arm}", {
            "output_dir": output, "max_steps": arguments.max_steps, "seed": arguments.seed,
            "checkpointer.checkpoint_dir": arguments.base,
        })  # fmt: skip
        checkpoints[arm] = output / "latest"
    arms = {}
    for arm, checkpoint in checkpoints.items():
        output = arguments.output_dir / "evaluate" / arm
        run_recipe("evaluate_distributed", "tiny/evaluate", {"output_dir": output, "checkpointer.checkpoint_dir": checkpoint})
        arms[arm] = held_out(json.loads((output / "results.json").read_text()))
    results = {"commit": commit(), "seconds": round(time.perf_counter() - begin, 1), "seed": arguments.seed,
               "max_steps": arguments.max_steps, "arms": arms}  # fmt: skip
    (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=2))
    draw(arguments.output_dir)
    show(results, arguments.output_dir)


def run_recipe(recipe: str, config: str, overrides: dict[str, Any]) -> None:
    """`pidistill run` in its own process; its progress bar is shown."""
    command = [sys.executable, "-m", "pidistill._cli", "run", "--nproc_per_node", "1", recipe, "--config", config]
    command += [f"{key}={value}" for key, value in overrides.items()]
    print("$", " ".join(["pidistill", *command[3:]]), flush=True)
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def held_out(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """One arm's numbers under the names of metrics.jsonl."""
    return {
        "eval_student_success_greedy": results["student greedy"]["success"],
        "eval_student_success": results["student"]["success"],
        "eval_teacher_success": results["student + PI"]["success"],
        "leak_frac": results["student"]["leak_frac"],
    }


def commit() -> str | None:
    """The checkout's commit, `-dirty` if it has changes; None outside a checkout."""
    root = folders()[0].parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None


def draw(output_dir: Path) -> None:
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4.6 * len(CURVES), 3.4), layout="constrained")
    for arm in ARMS:
        rows = [json.loads(line) for line in (output_dir / arm / "metrics.jsonl").read_text().splitlines()]
        for axis, (key, title) in zip(axes, CURVES.items(), strict=True):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(
                *zip(*points, strict=True), label=TITLES[arm], marker="o" if key.startswith("eval") else None, markersize=4
            )
            axis.set(title=title, xlabel="optimiser step (128 rollouts each)")
            axis.grid(alpha=0.3)
    axes[0].set_ylim(-0.02, 1.02)
    axes[2].set_yscale("log")
    axes[0].legend()
    figure.savefig(output_dir / "results.png", dpi=130)


def show(results: dict[str, Any], output_dir: Path) -> None:
    columns = {
        "eval_student_success_greedy": "without PI, greedy",
        "eval_student_success": "without PI, T=1",
        "eval_teacher_success": "with PI, T=1 (ceiling)",
        "leak_frac": "leak rate",
    }
    table = Table(title=f"Tiny world, 256 held-out tasks, {results['max_steps']} steps, seed {results['seed']}")
    for column in ["arm", *columns.values()]:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in TITLES:
        table.add_row(TITLES[arm], *[f"{results['arms'][arm][key]:.3f}" for key in columns])
    Console().print(table)
    print(f"{results['seconds']:.0f} s; {output_dir}/results.json, {output_dir}/results.png")
