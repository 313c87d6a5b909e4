"""`pidistill plan`: say whether a config will fit, where its time will go, and what would make it fit.

pidistill plan tiny/pi_distill
pidistill plan qwen2_5/0.5B_opsd --device h100 --prompt-tokens 150 --privileged-tokens 200
pidistill plan qwen2_5/0.5B_opsd --device a100 --ranks 4 micro_batch_tokens=4096

Overrides are those of `pidistill run`. Lengths come from the config's own tokenizer and the first rows of its dataset; no
weights are loaded. A config is code: its components are imported, and the model (without weights), teacher, objective and
optimizer are built, and what the prompts need; environment, reward and sampler are not. Ends with status 0 if the run fits, 1
if it does not, 2 if the config is wrong. What is counted and how close it comes: pidistill/commands/plan/__init__.py and
benchmarks/costs.py.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from pidistill.commands.common import config_parser, exit_on_input_error, parse_with_overrides
from pidistill.commands.plan.advice import HEADROOM_FRAC, PlannedRun, advice, fits
from pidistill.commands.plan.devices import GIB, PRESETS, Device, measured, preset
from pidistill.commands.plan.estimate import Estimate, estimate
from pidistill.commands.plan.lengths import RowLengths, given_rows, rows_of
from pidistill.commands.plan.reading import dtype_of, read
from pidistill.distributed.tensor_parallel import check_replicas
from pidistill.errors import InputError, one_line
from pidistill.training.keys import setting


def parser() -> argparse.ArgumentParser:
    made = config_parser("plan", __doc__)
    made.add_argument("--ranks", type=int, default=1, help="processes of all machines: --nproc_per_node times --nnodes")
    made.add_argument("--device", choices=("here", *PRESETS), default="here", help="default: measured on this machine")
    made.add_argument("--memory-gib", type=float, help="of each rank; default: what the device has")
    made.add_argument("--rows", type=int, default=200, help="rows of the dataset whose lengths are looked at")
    made.add_argument("--prompt-tokens", type=int, help="the student's prompt; then neither tokenizer nor dataset is needed")
    made.add_argument("--privileged-tokens", type=int, default=0, help="what the teacher's prompt has more")
    made.add_argument("--completion-tokens", type=int, help="default: sampler.max_new_tokens, the most it may be")
    made.add_argument("--json", action="store_true", help="all numbers, in bytes and seconds")
    return made


def main(argv: list[str]) -> None:
    with exit_on_input_error():
        sys.exit(0 if plan(parse_with_overrides(parser(), argv)) else 1)


def plan(arguments: argparse.Namespace) -> bool:
    """Print the estimate of a config, and what would make it fit; True if it fits."""
    if min(arguments.ranks, arguments.rows) < 1:
        raise InputError(f"--ranks {arguments.ranks} and --rows {arguments.rows} must be at least 1")
    for name in ("prompt_tokens", "privileged_tokens", "completion_tokens"):
        if (getattr(arguments, name) or 0) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 0")
    if arguments.memory_gib is not None and not 0 < arguments.memory_gib < math.inf:
        raise InputError(f"--memory-gib {arguments.memory_gib} must be above 0")
    cfg = read(arguments.config, arguments.overrides)
    if setting(cfg, "tensor_parallel_dim") != 1:
        raise InputError(
            f"pidistill plan cannot estimate a run with tensor_parallel_dim={cfg.tensor_parallel_dim}; plan with "
            "tensor_parallel_dim=1"
        )
    check_replicas(cfg, arguments.ranks, shares=1)
    _check_folder(cfg)
    device = _device(cfg, arguments)
    rows = _lengths(cfg, arguments)
    result = estimate(cfg, rows, arguments.ranks, device)
    fitting = fits(result.peak[1], device)
    changes = [] if fitting else advice(PlannedRun(cfg, arguments.ranks), rows, device)
    if arguments.json:
        print(json.dumps(_numbers(result, rows, device, fitting, changes)))
    else:
        _show(result, rows, device, arguments.ranks, changes)
    return fitting


def _check_folder(cfg: DictConfig) -> None:
    """Refuse a config whose model takes its sizes from a folder that is not there."""
    folder = cfg.model.get("path")
    if folder is not None and not (Path(folder) / "config.json").is_file():
        raise InputError(
            f"model.path {folder} has no config.json, from which the model's sizes are read; download the model (the config's "
            "second line), or set model.path to where it is (in the configs of this package: checkpointer.checkpoint_dir)"
        )


def _device(cfg: DictConfig, arguments: argparse.Namespace) -> Device:
    kind = str(cfg.get("device", "cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.device != "here":
        device = preset(arguments.device, dtype_of(cfg))
    elif kind.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"device is {kind}, which this machine does not have; name the device of the run with --device h100 or a100"
        )
    else:
        device = measured(torch.device(kind), dtype_of(cfg))
    if device.kind == "cpu":  # its ranks share one memory
        device = dataclasses.replace(device, memory_bytes=device.memory_bytes / arguments.ranks)
    if arguments.memory_gib is not None:
        device = dataclasses.replace(device, memory_bytes=arguments.memory_gib * GIB)
    return device


def _lengths(cfg: DictConfig, arguments: argparse.Namespace) -> RowLengths:
    if arguments.prompt_tokens is not None:
        return given_rows(cfg, arguments.prompt_tokens, arguments.privileged_tokens, arguments.completion_tokens)
    try:
        rows = rows_of(cfg, arguments.rows)
    except (InputError, OSError, ValueError) as error:
        reason = one_line(error)
        raise InputError(
            f"the rows' lengths cannot be read ({reason}); give --prompt-tokens and --privileged-tokens"
        ) from error
    if arguments.completion_tokens is None:
        return rows
    mean, longest = (
        dataclasses.replace(lengths, completion=arguments.completion_tokens) for lengths in (rows.mean, rows.longest)
    )
    return RowLengths(mean, longest, f"{rows.source.partition(', and')[0]}, and the completions given")


def _numbers(
    result: Estimate, rows: RowLengths, device: Device, fitting: bool, changes: list[tuple[str, float]]
) -> dict[str, Any]:
    return {
        "fits": fitting,
        "peak_phase": result.peak[0],
        "peak_bytes": result.peak[1],
        **dataclasses.asdict(result),
        "device": dataclasses.asdict(device),
        "rows": dataclasses.asdict(rows),
        "changes": [{"change": change, "peak_bytes": bytes_, "fits": fits(bytes_, device)} for change, bytes_ in changes],
    }


def _show(result: Estimate, rows: RowLengths, device: Device, ranks: int, changes: list[tuple[str, float]]) -> None:
    console = Console(width=120)
    phase, bytes_ = result.peak
    console.print(_memory_table(result, device, ranks), _time_table(result, device))
    mean = rows.mean
    console.print(
        f"lengths: student prompt {mean.student}, teacher prompt {mean.teacher} ({mean.shared} shared), completion "
        f"{mean.completion} (means; {rows.source})",
        f"the tree feeds {result.tree_tokens:,} tokens a round where the padded batch feeds {result.padded_tokens:,} "
        f"({result.padded_tokens / max(result.tree_tokens, 1):.1f}x)",
        sep="\n",
        highlight=False,
    )
    verdict = "fits" if fits(bytes_, device) else "does not fit"
    console.print(
        f"{verdict}: peak {_gib(bytes_)} in phase {phase}, {_gib(device.memory_bytes)} there; "
        f"{HEADROOM_FRAC:.0%} headroom asked",
        highlight=False,
    )
    for change, with_it in changes:
        told = f"  {_gib(with_it)}{' fits' if fits(with_it, device) else ''}: {change}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)


def _memory_table(result: Estimate, device: Device, ranks: int) -> Table:
    table = Table("GiB per rank", *result.memory, title=f"Memory, {ranks} x {device.name}", title_justify="left")
    for part in dict.fromkeys(part for parts in result.memory.values() for part in parts):
        sizes = [parts.get(part, 0.0) for parts in result.memory.values()]
        if any(sizes):
            table.add_row(part, *[f"{size / GIB:.2f}" if size else "" for size in sizes])
    table.add_section()
    table.add_row("total", *[f"{sum(parts.values()) / GIB:.2f}" for parts in result.memory.values()])
    return table


def _time_table(result: Estimate, device: Device) -> Table:
    table = Table(*result.seconds, title=f"Share of a round's time, {device.name}", title_justify="left")
    table.add_row(*[f"{s / sum(result.seconds.values()):.0%}" for s in result.seconds.values()])
    return table


def _gib(bytes_: float) -> str:
    return f"{bytes_ / GIB:.2f} GiB"
