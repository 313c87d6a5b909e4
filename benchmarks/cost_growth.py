"""How the update's cost grows: seconds per policy token and peak memory against group size, groups and token budget.

    python benchmarks/cost_growth.py                     # prints three tables, draws docs/cost_growth.png

Packed trees cut into micro-batches of `--budget` tokens, as the recipes do. Expected: time per policy token falls towards a
constant as a group shares its prompt, and is flat in the number of groups; memory depends on the budget alone. Every point
is a process of its own; times are CPU seconds of one thread, relative to the first point of a row of points, the fastest of
`--turns`.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from measure import GIB, PeakMemory, in_own_process, print_table
from omegaconf import OmegaConf
from update_phase import OBJECTIVE, build_model, rollouts_of

from pidistill.distributed.run import Run
from pidistill.losses.reductions import token_mean
from pidistill.scoring.packer import Packer
from pidistill.scoring.score import score

SIZES = {"question": 128, "privileged": 256, "completion": 64, "question_last": False, "shape": "small", "vocabulary": None,
         "layers": None, "device": "cpu", "dtype": "fp32"}  # fmt: skip


def one_step(model: torch.nn.Module, packer: Packer, pairs: list) -> None:
    tokens = sum(rollout.policy_tokens for rollout, _ in pairs)
    for chunk in packer.micro_batches(pairs):
        batch = packer.batch(chunk)
        scores = score(
            model,
            batch,
            OBJECTIVE.score_request(0),
            loss=lambda part, scores: OBJECTIVE.token_loss(part, scores, 0).loss,
        )
        token_mean(OBJECTIVE.token_loss(batch, scores, 0).loss, tokens).backward()
    model.zero_grad(set_to_none=False)


def point(groups: int, group: int, budget: int, turns: int) -> dict[str, float]:
    torch.set_num_threads(1)
    sizes = argparse.Namespace(**SIZES, groups=groups, group=group)
    model, device = build_model(sizes), torch.device("cpu")
    packer = Packer(OmegaConf.create({"micro_batch_tokens": budget}), Run(device, torch.float32, 0, 1, 0, Path()), pad_id=0)
    rollouts = rollouts_of(sizes, sizes.privileged)
    pairs = list(zip(rollouts, OBJECTIVE.advantages(rollouts, 0), strict=True))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    one_step(model, packer, pairs[:1])
    gc.collect()
    seconds = []
    with PeakMemory() as peak:
        for _ in range(turns):
            begin = time.process_time()
            one_step(model, packer, pairs)
            seconds.append(time.process_time() - begin)
    return {"ms_per_token": 1e3 * min(seconds) / sum(r.policy_tokens for r in rollouts), "gib": peak.bytes / GIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--picture", default="docs/cost_growth.png")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(point(*map(int, arguments.point.split(":")), arguments.turns)))
        return
    rows_of_points = {
        "group size (2 groups)": [(size, (2, size, arguments.budget)) for size in (1, 2, 4, 8, 16)],
        "groups of 8": [(groups, (groups, 8, arguments.budget)) for groups in (1, 2, 4, 8)],
        "tokens per micro-batch (8 groups of 8)": [(budget, (8, 8, budget)) for budget in (1024, 2048, 4096, 8192)],
    }
    measured = {
        axis: [
            (x, in_own_process(__file__, ["--turns", str(arguments.turns), "--point", ":".join(map(str, p))])) for x, p in row
        ]
        for axis, row in rows_of_points.items()
    }
    for axis, row in measured.items():
        first = row[0][1]["ms_per_token"]
        figures = [[str(x), f"{r['ms_per_token'] / first:.2f}", f"{r['gib']:.2f}"] for x, r in row]
        print_table(axis, ("", "time per policy token, first = 1", "peak GiB"), figures)
    draw(measured, Path(arguments.picture))


def draw(measured: dict[str, list], path: Path) -> None:
    figure, axes = plt.subplots(2, len(measured), figsize=(11, 5), sharex="col", layout="constrained")
    for column, (axis, row) in enumerate(measured.items()):
        xs = [x for x, _ in row]
        first = row[0][1]["ms_per_token"]
        axes[0, column].plot(xs, [r["ms_per_token"] / first for _, r in row], "o-")
        axes[1, column].plot(xs, [r["gib"] for _, r in row], "o-", color="tab:red")
        axes[1, column].set_xlabel(axis)
        axes[0, column].set_xscale("log", base=2)
        axes[1, column].set_xticks(xs, [f"{x:,}" for x in xs])
        for ax in axes[:, column]:
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("time per policy token\n(first point = 1)")
    axes[1, 0].set_ylabel("peak memory above\nweights and gradients, GiB")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
