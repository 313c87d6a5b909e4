"""The output head, forward and backward with the gradient of its weight: ours against Liger's, TRL's and two passes of ours.

    python benchmarks/scorer.py                                          # N=1024, H=1024, V=151,936, fp32: minutes on CPU
    python benchmarks/scorer.py --tokens 4096 --turns 1
    python benchmarks/scorer.py --device cuda --dtype bf16 --hidden 2560 --tokens 4096 16384

Three shapes of work: the generalised JSD (β=.5) with gradient through the student (as Liger's has), the same through both
sides, and what π-Distill asks for (two policy gradients, kl(teacher||student) both ways). Contenders take turns in one process;
memory is one process each: the peak above inputs and parameters, the weight's gradient included. Peers that are not installed
(`pip install liger-kernel trl`) are left out, which is said.

Floor: multiplications over the rate of a large matmul here: 4·N·H·V FLOPs for the logits of two sides and 4·N·H·V for each side
with gradient; bytes: the weight read and its gradient written once.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from measure import GIB, PeakMemory, by_turns, in_own_process, matmul_flops_per_s, median_ratio, print_table
from torch import Tensor

from pidistill.losses.divergences import generalised_jsd
from pidistill.objectives import PiDistill
from pidistill.scoring.head import ConstantPart, apply_head
from pidistill.scoring.head_numbers import ScorePlan
from pidistill.types import Batch, Divergence, ScoreRequest, Scores

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
OURS, AGAIN, LIGER, TRL, DENSE = "pidistill", "pidistill, two passes", "Liger, chunks of 128", "TRL, dense", "dense"
WORK = {"jsd_student": 1, "jsd_both": 2, "pi_distill": 2}  # sides with gradient
PEERS = {LIGER: "liger_kernel", TRL: "trl"}


class Problem:
    """Hidden states of both sides, one head, and a function per contender that leaves gradients on them."""

    def __init__(self, work: str, tokens: int, arguments: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden, vocabulary = arguments.hidden, arguments.vocabulary
        device, dtype = torch.device(arguments.device), getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[arguments.dtype])

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()

        self.work, self.chunk_tokens = work, arguments.chunk_tokens
        self.weight = randn(vocabulary, hidden, scale=hidden**-0.5)
        self.student, self.teacher = randn(tokens, hidden), randn(tokens, hidden)
        if WORK[work] == 1:
            self.teacher.requires_grad_(False)
        self.targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        self.advantages = torch.randn(tokens, generator=generator).to(device)

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        runs = {OURS: functools.partial(self.ours, one_pass=True), AGAIN: functools.partial(self.ours, one_pass=False)}
        if self.work == "jsd_student":
            runs |= {LIGER: self.liger}
        if self.work != "pi_distill":
            runs |= {TRL: self.trl, DENSE: self.dense}
        missing = {name for name, package in PEERS.items() if importlib.util.find_spec(package) is None}
        return {name: functools.partial(self.clean, run) for name, run in runs.items() if name not in missing}

    def clean(self, run: Callable[[], Tensor]) -> float:
        for x in (self.weight, self.student, self.teacher):
            x.grad = None
        loss = run()
        loss.backward()
        return loss.item()

    def ours(self, one_pass: bool) -> Tensor:
        request, loss = self.asked()
        plan = ScorePlan(self.targets, request, 1.0, self.chunk_tokens, loss if one_pass else None)
        hidden, constants = {"student": self.student, "teacher": self.teacher}, {}
        if WORK[self.work] == 1:
            constants = {"teacher": [ConstantPart(1.0, hidden.pop("teacher"), None)]}
        scores = plan.as_scores(apply_head(plan, hidden, self.weight, constants))
        return loss(slice(None), scores).mean()

    def asked(self) -> tuple[ScoreRequest, Callable[[slice, Scores], Tensor]]:
        if self.work != "pi_distill":
            divergence = Divergence("jsd", "both" if WORK[self.work] == 2 else "student", beta=0.5)
            request = ScoreRequest(True, WORK[self.work] == 2, divergences=(divergence,), entropy=False)
            return request, lambda _, scores: scores.divergences[divergence]
        objective, zeros = PiDistill(alpha=0.5), torch.zeros_like(self.targets)
        sampled = torch.full_like(self.advantages, -12.0)
        batch = Batch(None, self.targets, zeros, zeros, sampled, zeros, self.advantages, None, None, zeros == 0)
        return objective.score_request(0), lambda part, scores: objective.token_loss(batch.slice(part), scores, 0).loss

    def liger(self) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, chunk_size=128)
        return loss(self.student, self.weight, self.teacher, self.weight.detach(), self.targets)

    def trl(self) -> Tensor:
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        student, teacher = ((h @ self.weight.T).float()[None] for h in self.both())
        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.5) / len(self.targets)  # theirs: ÷ the batch of one

    def dense(self) -> Tensor:
        student, teacher = (torch.log_softmax((h @ self.weight.T).float(), -1) for h in self.both())
        return generalised_jsd(teacher, student, 0.5).mean()

    def both(self) -> tuple[Tensor, Tensor]:
        return self.student, self.teacher


def memory(work: str, name: str, tokens: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Peak bytes above inputs and parameters of the second run, after first-use buffers; dense ones only fit few tokens."""
    problem = Problem(work, tokens, arguments)
    (problem.student[:1] @ problem.weight.T).sum().item()
    with PeakMemory(torch.device(arguments.device)) as peak:
        loss = problem.contenders()[name]()
    return {"bytes": peak.bytes, "loss": loss}


def rows_of(work: str, tokens: int, arguments: argparse.Namespace) -> list[list[str]]:
    """One row per contender: seconds, ours against it, share of the floor, peak memory, loss."""
    device = torch.device(arguments.device)
    problem = Problem(work, tokens, arguments)
    contenders = problem.contenders()
    if tokens > arguments.dense_tokens:
        contenders = {name: run for name, run in contenders.items() if name not in (TRL, DENSE)}
    if arguments.contenders:
        contenders = {name: run for name, run in contenders.items() if name.startswith(tuple(arguments.contenders))}
    warm = Problem(work, 256, arguments).contenders()
    for name in contenders:
        warm[name]()
    del warm
    clock = time.process_time if arguments.own_seconds else time.perf_counter
    rate = matmul_flops_per_s(device, problem.weight.dtype, clock=clock)
    seconds = by_turns(contenders, arguments.turns, device, warm_up=False, clock=clock)
    del problem
    flops = (4 + 4 * WORK[work]) * tokens * arguments.hidden * arguments.vocabulary
    gradient = arguments.hidden * arguments.vocabulary * (4 if arguments.dtype == "fp32" else 2)
    floor = f"floor {flops / rate:.1f} s ({flops:.2e} FLOPs at {rate:.2e}/s), {gradient / GIB:.2f} GiB"
    print(f"{work}, N={tokens}: {floor}", flush=True)
    rows = []
    for name, times in seconds.items():
        share, ratio = flops / rate / statistics.median(times), median_ratio(times, seconds[OURS])
        row = [work, str(tokens), name, f"{statistics.median(times):.1f}", f"{ratio:.2f}×", f"{share:.0%}", "", ""]
        if not arguments.no_memory:
            peak = in_own_process(__file__, [*sys.argv[1:], "--case", f"{work}:{name}:{tokens}"])
            row[-2:] = [f"{peak['bytes'] / GIB:.2f}", f"{peak['loss']:.6f}"]
        rows.append(row)
        print("  ".join(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--chunk-tokens", type=int, default=None, help="ours; by default by size")
    parser.add_argument("--dense-tokens", type=int, default=0, help="dense contenders take part up to so many tokens")
    parser.add_argument("--contenders", nargs="+", default=None, help="names that start so, e.g. pidistill Liger")
    parser.add_argument("--own-seconds", action="store_true", help="CPU time of the process: one thread on a shared machine")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks, a process per contender")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        work, name, tokens = arguments.case.split(":")
        print(json.dumps(memory(work, name, int(tokens), arguments)))
        return
    absent = [package for package in PEERS.values() if importlib.util.find_spec(package) is None]
    if absent:
        print(f"not installed, left out: {', '.join(absent)}")
    rows = [row for tokens in arguments.tokens for work in arguments.work for row in rows_of(work, tokens, arguments)]
    title = f"H={arguments.hidden} V={arguments.vocabulary} {arguments.dtype} on {arguments.device}, torch {torch.__version__}"
    columns = ["work", "N", "", "seconds", "time ÷ ours", "of the floor", "peak GiB", "loss"]
    print_table(f"{title}, {torch.get_num_threads()} threads, {arguments.turns} turns", columns, rows)


if __name__ == "__main__":
    main()
