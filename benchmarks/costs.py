"""The cost model against what recipes take: the same config goes to `commands.plan.estimate` and to the recipe itself.

    python benchmarks/costs.py            # every case: about ten minutes on two cores
    python benchmarks/costs.py opsd lora  # two of them
    python benchmarks/costs.py --device cuda --dtype bf16 --layers 36 --width 2560 --vocabulary 151936

A small Qwen2.5 shape with random weights is trained for a few rounds; prompts, privileged information and completions have
the lengths that the model is told. Memory is what the process holds above what it held once everything was imported, at the
peak of the recipe's own phases; seconds are the recipe's own `time_*_s`. On CPU, memory is read in a process of its own with
an allocator that gives back at once what is freed (glibc otherwise keeps blocks below 32 MiB for later).

Reached on two shared CPU cores: peaks within 10 %, shares of time within 11 points, seconds too low by half.
"""

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import GIB, PeakMemory, _resident, in_own_process, print_table
from omegaconf import DictConfig, OmegaConf
from torch import nn

from pidistill.commands.plan.devices import Device, measured
from pidistill.commands.plan.estimate import Estimate, estimate
from pidistill.commands.plan.lengths import rows_of
from pidistill.tokenizers import WordTokenizer
from pidistill.training import start as training
from pidistill.types import Example

PROMPT, PRIVILEGED, COMPLETION = 128, 256, 64
ROUND = {"prompts_per_round": 4, "group_size": 8}

# recipe and what differs from the base config.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pi_distill": ("pi_distill_distributed", {"objective": "PiDistill"}),
    "large_head": ("pi_distill_distributed", {"objective": "PiDistill", "model.vocab_size": 65536}),
    "small_budget": (
        "pi_distill_distributed",
        {"objective": "PiDistill", "micro_batch_tokens": 1024},
    ),
    "checkpointing": (
        "pi_distill_distributed",
        {"objective": "PiDistill", "enable_activation_checkpointing": True},
    ),
    "opsd": ("opsd_distributed", {"objective": "OPSD"}),
    "ema_teacher": ("opsd_distributed", {"objective": "SDFT", "teacher": "EMATeacher"}),
    "lora": (
        "opsd_distributed",
        {
            "objective": "OPSD",
            "teacher": "AdapterOffTeacher",
            "model._component_": "torchtune.models.qwen2.lora_qwen2",
            "model.lora_attn_modules": ["q_proj", "v_proj"],
            "model.lora_rank": 8,
            "model.lora_alpha": 16,
        },
    ),
    "rl": ("opsd_distributed", {"objective": "GRPO"}),
}


# ---------------------------------------------------------------------------------------------- parts of the config


def words(vocabulary: int) -> WordTokenizer:
    return WordTokenizer([f"w{i}" for i in range(vocabulary)], pad="w0", bos="w1", end="w2", max_seq_len=4096)


def rows(count: int = 64) -> list[Example]:
    """Questions and privileged information of fixed lengths, out of a few hundred words."""

    def text(seed: int, n: int) -> str:
        ids = torch.randint(3, 500, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
        return " ".join(f"w{i}" for i in ids)

    return [
        Example(
            id=f"row {i}",
            messages=[{"role": "user", "content": text(2 * i, PROMPT - 1)}],
            privileged=text(2 * i + 1, PRIVILEGED),
        )
        for i in range(count)
    ]


def reward() -> Any:
    return lambda example, turns: float(len(turns[-1]["content"]) % 2)


class RandomWeights:
    """A checkpointer without files: hands out the fresh weights of ``model`` once, and saves nothing."""

    def __init__(self, model: nn.Module, output_dir: str) -> None:
        self._weights = model.state_dict()

    def load_checkpoint(self) -> dict[str, Any]:
        weights, self._weights = self._weights, None
        return {"model": weights}


def config(case: str, arguments: argparse.Namespace, output_dir: str) -> DictConfig:
    changed = dict(CASES[case][1])
    objective, teacher = changed.pop("objective"), changed.pop("teacher", "LiveTeacher")
    width = arguments.width
    cfg = OmegaConf.create(
        {
            "output_dir": output_dir,
            "seed": 0,
            "device": arguments.device,
            "dtype": arguments.dtype,
            "threads": 1,
            "max_steps": 3,
            "model": {
                "_component_": "torchtune.models.qwen2.qwen2",
                "vocab_size": arguments.vocabulary,
                "num_layers": arguments.layers,
                "num_heads": width // 64,
                "num_kv_heads": max(1, width // 256),
                "embed_dim": width,
                "intermediate_dim": 3 * width,
                "max_seq_len": 4096,
            },
            "tokenizer": {"_component_": "costs.words", "vocabulary": "${model.vocab_size}"},
            "checkpointer": {"_component_": "costs.RandomWeights", "model": "${model}"},
            "dataset": {"_component_": "costs.rows"},
            "environment": {"_component_": "pidistill.envs.SingleTurn", "reward": {"_component_": "costs.reward"}},
            "privileged": {
                "_component_": "pidistill.privileged.PrivilegedPrompt",
                "template": "{privileged}",
                "placement": "user_end",
                "leak_phrases": ["w3"],
            },
            "sampler": {"_component_": "pidistill.rollouts.TorchtuneSampler", "max_new_tokens": COMPLETION},
            "objective": {"_component_": f"pidistill.objectives.{objective}"},
            "teacher": {"_component_": f"pidistill.teachers.{teacher}"},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-5},
            **ROUND,
        }
    )
    for key, value in changed.items():
        OmegaConf.update(cfg, key, value)
    return cfg


# ---------------------------------------------------------------------------------------------- one case


def trained(cfg: DictConfig, case: str) -> dict[str, float]:
    """The recipe's own run: seconds per phase of a round after the first, and peak bytes per phase above the imports'."""
    module = importlib.import_module(f"recipes.{CASES[case][0]}")
    base, peaks = held(cfg), {}

    @contextlib.contextmanager
    def phase(self: training.Timer, name: str) -> Iterator[None]:
        before = held(cfg)
        with PeakMemory(self.device) as memory, timed(self, name):
            yield
        peaks[name] = max(peaks.get(name, 0), before + memory.bytes - base)

    timed, training.Timer.phase = training.Timer.phase, phase
    recipe = next(made for name, made in vars(module).items() if name.endswith("Recipe"))(cfg)
    recipe.setup(cfg)
    recipe.save_checkpoint = lambda: None
    recipe.train()
    recipe.cleanup()
    steps = [json.loads(line) for line in (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()]
    seconds = {p: statistics.median(s[f"time_{p}_s"] for s in steps[1:]) for p in ("rollout", "score", "update")}
    return {"seconds": seconds, "bytes": peaks, "policy_tokens": steps[-1]["policy_tokens"]}


def held(cfg: DictConfig) -> int:
    return torch.cuda.memory_allocated() if cfg.device == "cuda" else _resident()


def predicted(cfg: DictConfig, device: Device) -> dict[str, Any]:
    """The same numbers from the cost model: its phases put together as the recipe times them."""
    result: Estimate = estimate(cfg, rows_of(cfg, 64), 1, device)
    s, parts = result.seconds, {phase: sum(own.values()) - own["libraries"] for phase, own in result.memory.items()}
    return {
        "seconds": {
            "rollout": s["rollout"],
            "score": s["teacher"] + s["forward"] + s["head"],
            "update": s["backward"] + s["optimizer"],
        },
        "bytes": {"rollout": parts["rollout"], "training": max(v for k, v in parts.items() if k != "rollout")},
    }


# ---------------------------------------------------------------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", default=list(CASES), help=f"of: {', '.join(CASES)}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--no-memory", action="store_true", help="shares of time only")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # `recipes`: ours, not torchtune's
    if arguments.case:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(trained(config(arguments.case, arguments, folder), arguments.case)))
        return
    torch.set_num_threads(1)
    device = measured(torch.device(arguments.device), {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype])
    table = [row(case, arguments, device) for case in arguments.cases]
    print_table(
        f"{device.name}: {device.flops_per_s / 1e9:.0f} GFLOP/s, {device.bytes_per_s / 1e9:.0f} GB/s, "
        f"{device.layer_s * 1e6:.0f} µs per layer; predicted / measured",
        ["case", "rollout", "score", "update", "seconds, ratio"]
        + ([] if arguments.no_memory else ["rollout GiB", "training GiB", "ratio"]),
        table,
    )


def row(case: str, arguments: argparse.Namespace, device: Device) -> list[str]:
    model = predicted(config(case, arguments, "runs/costs"), device)
    seconds = measure(case, arguments, weigh=False)["seconds"]
    shares = [
        f"{model['seconds'][p] / sum(model['seconds'].values()):.0%} / {s / sum(seconds.values()):.0%}"
        for p, s in seconds.items()
    ]
    total = sum(model["seconds"].values()) / sum(seconds.values())
    sizes = [] if arguments.no_memory else memory_columns(model["bytes"], measure(case, arguments, weigh=True)["bytes"])
    return [case, *shares, f"{total:.2f}", *sizes]


def memory_columns(model: dict[str, float], measured: dict[str, float]) -> list[str]:
    """Of sampling and of the rest, and the ratio of the larger of the two, which decides whether the run fits."""
    measured = {"rollout": measured["rollout"], "training": max(measured["score"], measured["update"])}
    larger = max(measured, key=measured.get)
    columns = [f"{model[phase] / GIB:.2f} / {measured[phase] / GIB:.2f}" for phase in ("rollout", "training")]
    return [*columns, f"{model[larger] / measured[larger]:.2f}"]


def measure(case: str, arguments: argparse.Namespace, weigh: bool) -> dict[str, Any]:
    """Of a process of its own; ``weigh``: with an allocator that keeps nothing, which costs time."""
    words = [f"--{key}={getattr(arguments, key)}" for key in ("device", "dtype", "layers", "width", "vocabulary")]
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "0"} if weigh else {}
    try:
        return in_own_process(__file__, [*words, "--case", case])
    finally:
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            os.environ.pop(name, None)


if __name__ == "__main__":
    main()
