"""Scoring both views of a group, forward and backward, as packed trees against padded rows of the same rollouts.

    python benchmarks/update_phase.py                                        # 6 layers, 512 wide, on CPU
    python benchmarks/update_phase.py --privileged 512 2048 --question-last
    python benchmarks/update_phase.py --device cuda --dtype bf16 --shape qwen3_4b

π-Distill's loss (both log-probs, kl(teacher||student) towards both sides) on `--group` completions of one prompt. The padded
contender is `packing: padded`: the same rollouts side by side. Speed-ups are medians over turns of one run. Two floors: the
*token floor* is how many times fewer tokens the tree has, a speed-up that would be reached if time were proportional to
tokens; the *FLOP floor* is the tree's multiplications at this machine's matmul rate.
"""

import argparse
import gc
import json
import random
import time

import torch
from measure import GIB, PeakMemory, by_turns, in_own_process, matmul_flops_per_s, median_ratio, print_table
from torchtune.models.qwen2 import qwen2

from pidistill.losses.reductions import token_mean
from pidistill.objectives import PiDistill
from pidistill.scoring.batch import make_batch
from pidistill.scoring.score import score
from pidistill.types import Example, PromptPair, Rollout

SHAPES = {
    "small": {"num_layers": 6, "embed_dim": 512, "num_heads": 8, "num_kv_heads": 2, "intermediate_dim": 2752,
              "vocab_size": 8192},
    # Qwen3-4B's widths on Qwen2's layers: 20 heads of 128 where Qwen3 has 32.
    "qwen3_4b": {"num_layers": 36, "embed_dim": 2560, "num_heads": 20, "num_kv_heads": 4, "intermediate_dim": 9728,
                 "vocab_size": 151_936},
}  # fmt: skip
OBJECTIVE = PiDistill(alpha=0.5, beta=1.0, kl_mode="loss_rb", student_kl="loss", student_term="ppo")


def rollouts_of(arguments: argparse.Namespace, privileged: int) -> list[Rollout]:
    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(1, 8000) for _ in range(n)]

    rollouts = []
    for group in range(arguments.groups):
        question, pi, turn = ids(arguments.question), ids(privileged), [3]
        student = question + turn
        prompts = PromptPair(student, pi + student if arguments.question_last else question + pi + turn, has_privileged=True)
        for _ in range(arguments.group):
            n = arguments.completion
            rollouts.append(
                Rollout(Example(f"row {group}", []), prompts, ids(n), [True] * n, [-9.0] * n, "teacher", group, "done", [],
                        reward=draw.random())
            )  # fmt: skip
    return rollouts


def build_model(arguments: argparse.Namespace) -> torch.nn.Module:
    given = {"vocab_size": arguments.vocabulary, "num_layers": arguments.layers}
    shape = SHAPES[arguments.shape] | {key: value for key, value in given.items() if value}
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = qwen2(**shape, max_seq_len=32768, tie_word_embeddings=True)
    return model.to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[arguments.dtype]))


def update(model: torch.nn.Module, rollouts: list[Rollout], packing: str, device: torch.device) -> float:
    """What the recipes do between two optimiser steps, in one micro-batch."""
    advantages = OBJECTIVE.advantages(rollouts, 0)
    batch = make_batch(rollouts, advantages, pad_id=0, device=device, packing=packing)
    scores = score(
        model, batch, OBJECTIVE.score_request(0), loss=lambda part, scores: OBJECTIVE.token_loss(part, scores, 0).loss
    )
    loss = token_mean(OBJECTIVE.token_loss(batch, scores, 0).loss, batch.targets.numel())
    loss.backward()
    model.zero_grad(set_to_none=False)  # gradients stay allocated, as from one micro-batch to the next
    return loss.item()


def tokens_of(rollouts: list[Rollout], packing: str) -> int:
    batch = make_batch(rollouts, None, pad_id=0, device=torch.device("cpu"), packing=packing)
    return batch.views.of("student", "teacher").tokens.numel()


def tree_flops(model: torch.nn.Module, rollouts: list[Rollout]) -> float:
    """Multiplications of forward and backward: 6 per weight and token, 12 per visible pair and channel, the head's 8 + 4."""
    batch = make_batch(rollouts, None, pad_id=0, device=torch.device("cpu"), packing="tree")
    mask = batch.views.of("student", "teacher").mask
    pairs = float(sum(end - k for k, end in enumerate(mask.ends.tolist())))
    embedding = model.tok_embeddings.weight
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2) - embedding.numel()
    width = sum(layer.attn.num_heads * layer.attn.head_dim for layer in model.layers)
    head = 2 * batch.targets.numel() * 6 * embedding.numel()
    return 6 * body * len(mask.ends) + 12 * pairs * width + head


def memory_case(arguments: argparse.Namespace) -> None:
    packing, privileged = arguments.case.split(":")
    device = torch.device(arguments.device)
    model, rollouts = build_model(arguments), rollouts_of(arguments, int(privileged))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    short = rollouts_of(argparse.Namespace(**vars(arguments) | {"question": 8, "completion": 8, "group": 2}), 8)
    update(model, short, packing, device)  # buffers of first use
    gc.collect()
    with PeakMemory(device) as peak:
        loss = update(model, rollouts, packing, device)
    print(json.dumps({"gib": peak.bytes / GIB, "loss": loss}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", type=int, default=256, help="tokens that both views share")
    parser.add_argument("--privileged", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--question-last", action="store_true", help="PI before the question: the views share nothing")
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--vocabulary", type=int, default=None)
    parser.add_argument("--layers", type=int, default=None, help="instead of the shape's own number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--own-seconds", action="store_true", help="one thread's CPU seconds, for a machine that others use")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.own_seconds:
        arguments.threads = 1
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.clock = time.process_time if arguments.own_seconds else time.perf_counter
    if arguments.case:
        memory_case(arguments)
        return
    device, model, rows = torch.device(arguments.device), build_model(arguments), []
    rate = matmul_flops_per_s(device, next(model.parameters()).dtype, clock=arguments.clock)
    for privileged in arguments.privileged:
        rows.append(measure(arguments, model, privileged, device, rate))
    order = "PI before the question" if arguments.question_last else "PI after the question"
    sizes = (
        f"question {arguments.question}, {order}, {arguments.groups} × {arguments.group} completions of {arguments.completion}"
    )
    columns = (
        "PI",
        "tokens padded",
        "tree",
        "token floor",
        "speed-up",
        "of it",
        "ms tree",
        "of FLOP floor",
        "GiB padded",
        "tree",
        "less",
    )
    print_table(f"update phase, {sizes}; {rate / 1e9:.0f} GFLOP/s matmul", columns, rows)


def measure(
    arguments: argparse.Namespace, model: torch.nn.Module, privileged: int, device: torch.device, rate: float
) -> list[str]:
    rollouts = rollouts_of(arguments, privileged)
    padded, tree = (tokens_of(rollouts, packing) for packing in ("padded", "tree"))
    memory = ["–"] * 3  # first: this process is still small
    if not arguments.no_memory:
        own = [
            in_own_process(__file__, [*options(arguments), "--case", f"{packing}:{privileged}"])
            for packing in ("padded", "tree")
        ]
        assert abs(own[0]["loss"] - own[1]["loss"]) < 1e-3 * max(1.0, abs(own[0]["loss"])), own
        memory = [f"{own[0]['gib']:.2f}", f"{own[1]['gib']:.2f}", f"{own[0]['gib'] / own[1]['gib']:.1f}×"]
    seconds = by_turns(
        {packing: lambda packing=packing: update(model, rollouts, packing, device) for packing in ("padded", "tree")},
        arguments.turns,
        device,
        clock=arguments.clock,
    )
    speed_up, fastest = median_ratio(seconds["padded"], seconds["tree"]), min(seconds["tree"])
    floor = padded / tree
    return [
        str(privileged), f"{padded:,}", f"{tree:,}", f"{floor:.2f}×", f"{speed_up:.2f}×", f"{speed_up / floor:.0%}",
        f"{fastest * 1e3:.0f}", f"{tree_flops(model, rollouts) / rate / fastest:.0%}", *memory,
    ]  # fmt: skip


def options(arguments: argparse.Namespace) -> list[str]:
    """The same sizes for a process of its own."""
    names = ("question", "completion", "group", "groups", "shape", "vocabulary", "layers", "device", "dtype", "threads")
    given = [f"--{name}={getattr(arguments, name)}" for name in names if getattr(arguments, name) is not None]
    return given + ["--question-last"] * arguments.question_last


if __name__ == "__main__":
    main()
