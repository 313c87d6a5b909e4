"""`pidistill demo`: methods against the RL control at equal rollouts on the tiny world, from one base, on held-out tasks.

Trains each arm with its bundled config, evaluates base and arms on the test split (nothing was selected on it), and leaves a
table in the terminal, results.json and results.png in the output folder.
"""

import argparse
import json
import statistics
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

RECIPES = {
    "pi_distill": "pi_distill_distributed",
    "opsd": "opsd_distributed",
    "rl": "opsd_distributed",
    "sft": "sft_distributed",
}
TITLES = {
    "base": "base",
    "sft": "SFT on the expert's actions",
    "rl": "RL (GRPO)",
    "opsd": "OPSD, frozen teacher",
    "pi_distill": "π-Distill α=.5",
}
COLUMNS = {
    "eval_student_success_greedy": "without PI, greedy",
    "eval_student_success": "without PI, T=1",
    "eval_teacher_success": "with PI, T=1 (ceiling)",
    "leak_frac": "leak rate",
}
CURVES = {
    "eval_student_success_greedy": "success without PI (validation, greedy)",
    "leak_frac": "leak rate of the sampled rollouts",
    "kl_teacher_student_nats": "kl(teacher||student), nats per token",
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="pidistill demo", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--base", type=Path, default=Path("runs/tiny/base/latest"))
    parser.add_argument("--arms", nargs="+", choices=list(RECIPES), default=["pi_distill", "rl"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--max-steps", type=int, help="of every arm, in place of what its config says")
    arguments = parser.parse_args(argv)
    begin = time.perf_counter()
    cells = {("base", 0): evaluate(arguments.base, arguments.output_dir / "evaluate" / "base")}
    for arm in arguments.arms:
        for seed in arguments.seeds:
            cells[arm, seed] = train_and_evaluate(arm, seed, arguments)
    per_seed = {arm: [cell for (name, _), cell in cells.items() if name == arm] for arm in ["base", *arguments.arms]}
    results = {
        "commit": commit(),
        "seconds": round(time.perf_counter() - begin, 1),
        "seeds": arguments.seeds,
        "arms": {arm: {key: statistics.fmean(row[key] for row in rows) for key in COLUMNS} for arm, rows in per_seed.items()},
        "per_seed": per_seed,
    }
    (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=2))
    draw(arguments.arms, arguments.seeds, arguments.output_dir)
    show(results)
    print(f"{results['seconds']:.0f} s; {arguments.output_dir}/results.json, {arguments.output_dir}/results.png")


def train_and_evaluate(arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    output = cell_folder(arguments.output_dir, arm, seed)
    overrides = {"output_dir": output, "seed": seed, "checkpointer.checkpoint_dir": arguments.base}
    if arguments.max_steps is not None:
        overrides["max_steps"] = arguments.max_steps
    run_recipe(RECIPES[arm], f"tiny/{arm}", overrides)
    return evaluate(output / "latest", arguments.output_dir / "evaluate" / output.name)


def cell_folder(output_dir: Path, arm: str, seed: int) -> Path:
    return output_dir / f"{arm}_seed{seed}"


def evaluate(checkpoint: Path, output: Path) -> dict[str, float]:
    """Held-out numbers of a checkpoint, under the names of metrics.jsonl."""
    run_recipe("evaluate_distributed", "tiny/evaluate", {"output_dir": output, "checkpointer.checkpoint_dir": checkpoint})
    views = json.loads((output / "results.json").read_text())
    return {
        "eval_student_success_greedy": views["student greedy"]["success"],
        "eval_student_success": views["student"]["success"],
        "eval_teacher_success": views["student + PI"]["success"],
        "leak_frac": views["student"]["leak_frac"],
    }


def run_recipe(recipe: str, config: str, overrides: dict[str, Any]) -> None:
    """`pidistill run` in its own process; its progress bar is shown."""
    command = [sys.executable, "-m", "pidistill._cli", "run", "--nproc_per_node", "1", recipe, "--config", config]
    command += [f"{key}={value}" for key, value in overrides.items()]
    print("$", " ".join(["pidistill", *command[3:]]), flush=True)
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def commit() -> str | None:
    """The checkout's commit, `-dirty` if it has changes; None outside a checkout of this project."""
    root = folders()[0].parent
    if not (root / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None


def draw(arms: list[str], seeds: list[int], output_dir: Path) -> None:
    """Learning curves, one thin line per seed."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4.6 * len(CURVES), 3.4), layout="constrained")
    for color, arm in enumerate(arms):
        for seed in seeds:
            path = cell_folder(output_dir, arm, seed) / "metrics.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for axis, (key, title) in zip(axes, CURVES.items(), strict=True):
                points = [(row["step"], row[key]) for row in rows if key in row]
                style = {"marker": "o", "markersize": 4} if key.startswith("eval") else {}
                label = TITLES[arm] if seed == seeds[0] else None
                if points:
                    axis.plot(*zip(*points, strict=True), color=f"C{color}", label=label, alpha=0.8, **style)
                axis.set(title=title, xlabel="optimiser step")
                axis.grid(alpha=0.3)
    axes[0].set_ylim(-0.02, 1.02)
    axes[2].set_yscale("log")
    axes[0].legend()
    figure.savefig(output_dir / "results.png", dpi=130)


def show(results: dict[str, Any]) -> None:
    seeds = ", ".join(map(str, results["seeds"]))
    table = Table(title=f"Tiny world, 256 held-out tasks; seeds {seeds}")
    for column in ["arm", *COLUMNS.values()]:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in TITLES:
        if arm in results["arms"]:
            table.add_row(TITLES[arm], *[mean_and_sd([row[key] for row in results["per_seed"][arm]]) for key in COLUMNS])
    Console().print(table)


def mean_and_sd(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"
