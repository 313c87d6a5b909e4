"""`pidistill plan`: will this config fit, where will its time go, and what would make it fit?

pidistill plan tiny/pi_distill
pidistill plan qwen2_5/0.5B_opsd --device h100 --prompt-tokens 150 --privileged-tokens 200
pidistill plan qwen2_5/0.5B_opsd --device a100 --ranks 4 micro_batch_tokens=4096

Overrides are those of `pidistill run`. Lengths come from the config's own tokenizer and the first rows of its dataset; no
weights are loaded. Ends with status 0 if the run fits, 1 if it does not, 2 if the config is wrong. What is counted and how
close it comes: pidistill/costs.py and benchmarks/costs.py.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from torchtune import training
from torchtune.config._utils import _merge_yaml_and_cli_args
from torchtune.training.precision import PRECISION_STR_TO_DTYPE

from pidistill.adapters import has_adapters
from pidistill.config import build, resolve
from pidistill.costs import ModelShape, Pass, Setup, Workload, chunk_tokens, count_tokens, memory, model_shape, peak, seconds
from pidistill.data import demonstration
from pidistill.devices import GIB, PRESETS, Device, measured, preset
from pidistill.errors import InputError
from pidistill.privileged import PrivilegedPrompt
from pidistill.rounds import ROUND_KEYS, Round
from pidistill.sweeps.cells import load_config
from pidistill.teachers import EMATeacher, LiveTeacher, Teacher, TrustRegionTeacher
from pidistill.tokenizers import as_chat_tokenizer
from pidistill.training import COMMON_KEYS, check_run, empty_model
from pidistill.types import ScoreRequest

KEYS = COMMON_KEYS | ROUND_KEYS | {"hindsight", "batch_size"}
SFT_REQUEST = ScoreRequest(student_grad=True, teacher_grad=False, views=("student",))


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows' prompts, and what a completion may have at most; ``shared``: how far both prompts agree."""

    student: int
    teacher: int
    shared: int
    completion: int


_ONE_TOKEN = Lengths(1, 1, 1, 1)


@dataclass(frozen=True)
class Rows:
    """``mean`` decides the time, ``longest`` the memory; ``source`` says where they come from."""

    mean: Lengths
    longest: Lengths
    source: str


@dataclass(frozen=True)
class Estimate:
    """Bytes by phase and part, seconds by phase of a round, and what the tree feeds of the padded batch's tokens."""

    memory: dict[str, dict[str, float]]
    seconds: dict[str, float]
    tree_tokens: int
    padded_tokens: int

    @property
    def peak(self) -> tuple[str, float]:
        return peak(self.memory)


# ---------------------------------------------------------------------------------------------- from a config to the model


def read(config: str, overrides: Sequence[str]) -> DictConfig:
    """The config as a run would read it; wrong keys and numbers are refused as there."""
    try:
        cfg = _merge_yaml_and_cli_args(argparse.Namespace(**load_config(config)), list(overrides))
    except (ValueError, OmegaConfBaseException) as error:
        raise InputError(f"config {config} does not take {' '.join(overrides)} ({' '.join(str(error).split())})") from error
    if "optimizer" not in cfg:
        raise InputError(f"config {config} trains nothing (it has no optimizer); plan one of a recipe that trains")
    rounds = ("objective", "sampler", "privileged", "prompts_per_round", "group_size")
    check_run(cfg, KEYS, ("model", "tokenizer", "dataset", *(("batch_size",) if "batch_size" in cfg else rounds)))
    return cfg


def estimate(cfg: DictConfig, rows: Rows, ranks: int, device: Device) -> Estimate:
    setup = setup_of(cfg, ranks, device.kind)
    typical, longest = (workload_of(cfg, lengths, ranks) for lengths in (rows.mean, rows.longest))
    tree, padded = (_fed(setup, dataclasses.replace(typical, packing=packing)) for packing in ("tree", "padded"))
    return Estimate(memory(setup, longest), seconds(setup, typical, device), tree, padded)


def _fed(setup: Setup, work: Workload) -> int:
    """Tokens that the updates of a round feed to models."""
    return work.updates * sum(count_tokens(work, one.views, work.trained_groups).fed for one in setup.update)


def setup_of(cfg: DictConfig, ranks: int, device: str) -> Setup:
    model = _shape(cfg.model, _dtype(cfg))
    teacher = build(cfg.teacher) if cfg.get("teacher") else LiveTeacher()
    objective = build(cfg.objective) if cfg.get("objective") else None
    request = objective.score_request(0) if objective else SFT_REQUEST
    behaviour = objective.behaviour_request() if objective else None
    other = _shape(cfg.get("teacher_model") or cfg.model, _dtype(cfg)) if teacher.own_weights else None
    return Setup(
        model=model,
        update=tuple(_passes(request, teacher, model, other)),
        behaviour=tuple(_passes(behaviour, teacher, model, other)) if behaviour else (),
        teacher_parameters=other.parameters if other else 0,
        average_elements=model.trained if isinstance(teacher, EMATeacher) else 0,
        state_bytes=_state_bytes(cfg.optimizer, model.item_bytes),
        ranks=ranks,
        reshard=bool(cfg.get("fsdp_reshard_after_forward", True)),
        cpu_offload=bool(cfg.get("fsdp_cpu_offload", False)) and ranks > 1,
        checkpointing=bool(cfg.get("enable_activation_checkpointing", False)),
        device=device,
    )


def _passes(request: ScoreRequest, teacher: Teacher, model: ModelShape, other: ModelShape | None) -> Iterator[Pass]:
    """The forwards of `pidistill.scoring.score`: views with gradient in one, every constant view in one of its own."""
    gradient = tuple(view for view in request.views if (request.student_grad, request.teacher_grad)[view == "teacher"])
    live = tuple(view for view in request.views if view == "student" or teacher.live or request.teacher_grad)
    called = gradient or live
    yield from (Pass(model, (view,)) for view in live if view not in called)
    # Beside a live teacher view that is trained, a given teacher serves only what reaches the student alone.
    if not teacher.live and "teacher" in request.views and ("teacher" not in live or _reaches_student(request)):
        yield Pass(other or model, ("teacher",))
        if isinstance(teacher, TrustRegionTeacher) and "teacher" not in live:
            yield Pass(model, ("teacher",))
    if called:
        yield Pass(model, called, gradient)


def _reaches_student(request: ScoreRequest) -> bool:
    return any(divergence.grad == "student" for divergence in request.divergences)


def workload_of(cfg: DictConfig, lengths: Lengths, ranks: int) -> Workload:
    """This rank's part of a round, the busiest rank's where prompts do not divide."""
    common = {
        **dataclasses.asdict(lengths),
        "packing": _packing(cfg),
        "micro_batch_tokens": _budget(cfg),
        "chunk_tokens": cfg.get("score_chunk_tokens"),
    }
    if "batch_size" in cfg:
        return Workload(group_size=1, groups=0, trained_groups=-(-cfg.batch_size // ranks), views=SFT_REQUEST.views, **common)
    sizes = Round(cfg)
    objective = build(cfg.objective)
    return Workload(
        group_size=sizes.group_size,
        groups=-(-sizes.prompts // ranks),
        trained_groups=-(-sizes.minibatch // sizes.group_size // ranks),
        updates=sizes.updates,
        views=objective.score_request(0).views,
        sampled_view=objective.sampling_view(),
        sampler_rows=cfg.sampler.get("max_batch_size"),
        **common,
    )


def _packing(cfg: DictConfig) -> str:
    return cfg.get("packing") or "tree"


def _budget(cfg: DictConfig) -> int:
    return int(cfg.get("micro_batch_tokens") or 8192)


def _dtype(cfg: DictConfig) -> torch.dtype:
    """By name alone: the run may be planned on a machine that cannot run it."""
    name = cfg.get("dtype", "fp32")
    if name not in ("fp32", "bf16"):
        raise InputError(f"dtype={name} cannot be planned; set dtype to fp32 or bf16")
    return PRECISION_STR_TO_DTYPE[name]


def _shape(node: Any, dtype: torch.dtype) -> ModelShape:
    return _shape_of(json.dumps(OmegaConf.to_container(node, resolve=True), sort_keys=True), dtype)


@cache
def _shape_of(node: str, dtype: torch.dtype) -> ModelShape:
    with training.set_default_dtype(dtype):
        return model_shape(empty_model(json.loads(node)))


def _state_bytes(node: DictConfig, item_bytes: int) -> float:
    """Of one trained element, in the parameter's dtype as torch keeps it; counted on a parameter that takes one step."""
    parameter = torch.nn.Parameter(torch.zeros(4096, dtype={2: torch.bfloat16, 4: torch.float32}[item_bytes]))
    optimizer = build(node, [parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = (x for x in optimizer.state[parameter].values() if isinstance(x, torch.Tensor) and x.numel() > 1)
    return sum(x.untyped_storage().nbytes() for x in states) / parameter.numel()


# ---------------------------------------------------------------------------------------------- the lengths of its rows


def rows_of(cfg: DictConfig, count: int) -> Rows:
    """Lengths of the first ``count`` rows, from the config's own tokenizer, dataset and privileged prompt."""
    tokenizer = as_chat_tokenizer(build(cfg.tokenizer))
    privileged = build(cfg.privileged) if cfg.get("privileged") else PrivilegedPrompt()
    dataset = build(cfg.dataset)
    examples = privileged.apply_control([dataset[i] for i in range(min(count, len(dataset)))])
    views = [privileged.build(example, tokenizer) for example in examples]
    if not views:
        raise InputError("the dataset has no rows; check `dataset`, or give --prompt-tokens and --privileged-tokens")
    limit = cfg.sampler.max_new_tokens if "batch_size" not in cfg else None
    lengths = [
        Lengths(
            len(view.pair.student),
            len(view.pair.teacher),
            _shared(view.pair.student, view.pair.teacher),
            limit or len(demonstration(example, view.pair, tokenizer).completion),
        )
        for example, view in zip(examples, views, strict=True)
    ]
    said = "sampler.max_new_tokens for every completion, the most it may be" if limit else "the demonstrations' completions"
    return Rows(_each(statistics.fmean, lengths), _each(max, lengths), f"the first {len(lengths)} rows, and {said}")


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _each(statistic: Callable[[list[int]], float], lengths: Sequence[Lengths]) -> Lengths:
    """Field by field, in whole tokens; what both views share is no longer than either."""
    columns = [round(statistic(list(column))) for column in zip(*map(dataclasses.astuple, lengths), strict=True)]
    student, teacher, shared, completion = columns
    return Lengths(student, teacher, min(shared, student, teacher), max(completion, 1))


def given_rows(cfg: DictConfig, prompt: int, privileged: int, completion: int | None) -> Rows:
    """Lengths from the command line; nothing counts as shared where privileged information stands before the question."""
    said = "the lengths given"
    if completion is None:
        if "batch_size" in cfg:
            raise InputError("a supervised run samples nothing, so its completions have no limit; give --completion-tokens")
        completion, said = int(cfg.sampler.max_new_tokens), "the lengths given, and sampler.max_new_tokens for completions"
    at_end = (cfg.get("privileged") or {}).get("placement") in ("user_end", "after_user")
    lengths = Lengths(prompt, prompt + privileged, prompt if at_end or not privileged else 0, completion)
    return Rows(lengths, lengths, said)


# ---------------------------------------------------------------------------------------------- what would make it fit

# Ragged lengths, the allocator's gaps and what the estimate misses.
_HEADROOM_FRAC = 0.1


def fits(bytes_: float, device: Device) -> bool:
    return bytes_ * (1 + _HEADROOM_FRAC) <= device.memory_bytes


@dataclass(frozen=True)
class Run:
    """A config on a number of ranks; a change makes another one of it."""

    cfg: DictConfig
    ranks: int
    changes: tuple[str, ...] = ()

    def with_(self, *overrides: str, ranks: int | None = None) -> "Run":
        cfg = OmegaConf.merge(self.cfg, OmegaConf.from_dotlist(list(overrides)))
        words = (*overrides, *([f"--ranks {ranks}"] if ranks else []))
        return Run(cfg, ranks or self.ranks, (*self.changes, " ".join(words)))


def advice(run: Run, rows: Rows, device: Device) -> list[tuple[str, float]]:
    """(change, peak bytes with it): one of each kind that helps, and where none is enough alone, as many as it takes."""

    def size(run: Run) -> float:
        setup, longest = setup_of(run.cfg, run.ranks, device.kind), workload_of(run.cfg, rows.longest, run.ranks)
        return peak(memory(setup, longest))[1]

    def enough(steps: list[Run]) -> tuple[Run, float]:
        """The first step that fits, else the last."""
        sizes = ((step, size(step)) for step in steps)
        return next((pair for pair in sizes if fits(pair[1], device)), (steps[-1], size(steps[-1])))

    found, together, least = [], run, size(run)
    for kind in KINDS:
        if steps := kind(run, device):
            step, bytes_ = enough(steps)
            found += [(step.changes[-1], bytes_)] if bytes_ < 0.99 * size(run) else []
        if not fits(least, device) and (steps := kind(together, device)):
            step, bytes_ = enough(steps)
            together, least = (step, bytes_) if bytes_ < 0.99 * least else (together, least)
    alone = any(fits(bytes_, device) for _, bytes_ in found)
    return found if alone or len(together.changes) < 2 else [*found, (" ".join(together.changes), least)]


def _fewer_rows_sampled(run: Run, device: Device) -> list[Run]:
    if "batch_size" in run.cfg:
        return []
    rows = -(-run.cfg.prompts_per_round // run.ranks) * run.cfg.group_size
    return [run.with_(f"sampler.max_batch_size={n}") for n in _halves(run.cfg.sampler.get("max_batch_size") or rows)]


def _packed(run: Run, device: Device) -> list[Run]:
    return [run.with_("packing=tree")] if _packing(run.cfg) == "padded" else []


def _smaller_micro_batches(run: Run, device: Device) -> list[Run]:
    return [run.with_(f"micro_batch_tokens={n}") for n in _halves(_budget(run.cfg), least=256)]


def _smaller_chunks(run: Run, device: Device) -> list[Run]:
    """Of the head's logits."""
    model, views = _shape(run.cfg.model, _dtype(run.cfg)), len(workload_of(run.cfg, _ONE_TOKEN, run.ranks).views)
    size = run.cfg.get("score_chunk_tokens") or chunk_tokens(model, views, device.kind)
    return [run.with_(f"score_chunk_tokens={n}") for n in _halves(size, least=32)]


def _checkpointing(run: Run, device: Device) -> list[Run]:
    return [] if run.cfg.get("enable_activation_checkpointing") else [run.with_("enable_activation_checkpointing=true")]


def _no_second_copy(run: Run, device: Device) -> list[Run]:
    """A LoRA model without its adapters is its own frozen teacher."""
    own = run.cfg.get("teacher") and build(run.cfg.teacher).own_weights and not run.cfg.get("teacher_checkpointer")
    needless = own and has_adapters(empty_model(run.cfg.model))
    return [run.with_("teacher._component_=pidistill.teachers.AdapterOffTeacher")] if needless else []


def _more_ranks(run: Run, device: Device) -> list[Run]:
    """Ranks on a CPU share its memory."""
    return [run.with_(ranks=n) for n in (2, 4, 8) if n > run.ranks and device.kind == "cuda"]


def _offload(run: Run, device: Device) -> list[Run]:
    useful = device.kind == "cuda" and run.ranks > 1 and not run.cfg.get("fsdp_cpu_offload")
    return [run.with_("fsdp_cpu_offload=true")] if useful else []


def _bf16(run: Run, device: Device) -> list[Run]:
    return [run.with_("dtype=bf16")] if run.cfg.get("dtype", "fp32") == "fp32" else []


def _lora(run: Run, device: Device) -> list[Run]:
    """torchtune's variant of the builder, where there is one."""
    module, _, name = run.cfg.model._component_.rpartition(".")
    try:
        resolve(f"{module}.lora_{name}")
    except InputError:
        return []
    sizes = ("model.lora_attn_modules=[q_proj,v_proj]", "model.lora_rank=8", "model.lora_alpha=16")
    return [run.with_(f"model._component_={module}.lora_{name}", *sizes)]


# From what changes nothing but time to what changes the method.
KINDS = (
    _fewer_rows_sampled, _packed, _smaller_micro_batches, _smaller_chunks, _checkpointing, _no_second_copy, _more_ranks,
    _offload, _bf16, _lora,
)  # fmt: skip


def _halves(largest: int, least: int = 1) -> list[int]:
    return [largest >> n for n in range(1, largest.bit_length()) if largest >> n >= least]


# ---------------------------------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="pidistill plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("config", help="a bundled config, or a path")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    made.add_argument("--ranks", type=int, default=1, help="processes, as in --nproc_per_node")
    made.add_argument("--device", choices=("here", *PRESETS), default="here", help="default: measured on this machine")
    made.add_argument("--memory-gib", type=float, help="of each rank; default: what the device has")
    made.add_argument("--rows", type=int, default=200, help="rows of the dataset whose lengths are looked at")
    made.add_argument("--prompt-tokens", type=int, help="the student's prompt; then neither tokenizer nor dataset is needed")
    made.add_argument("--privileged-tokens", type=int, default=0, help="what the teacher's prompt has more")
    made.add_argument("--completion-tokens", type=int, help="default: sampler.max_new_tokens, the most it may be")
    made.add_argument("--json", action="store_true", help="all numbers, in bytes and seconds")
    return made


def main(argv: list[str]) -> None:
    is_override = [("=" in word and not word.startswith("--")) or word.startswith("~") for word in argv]
    overrides = [word for word, it_is in zip(argv, is_override, strict=True) if it_is]
    arguments = parser().parse_args([word for word, it_is in zip(argv, is_override, strict=True) if not it_is])
    try:
        sys.exit(0 if plan(arguments, overrides) else 1)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> bool:
    """Print the estimate of a config, and what would make it fit; True if it fits."""
    if min(arguments.ranks, arguments.rows) < 1:
        raise InputError(f"--ranks {arguments.ranks} and --rows {arguments.rows} must be at least 1")
    cfg = read(arguments.config, overrides)
    device = _device(cfg, arguments)
    rows = _lengths(cfg, arguments)
    result = estimate(cfg, rows, arguments.ranks, device)
    fitting = fits(result.peak[1], device)
    changes = [] if fitting else advice(Run(cfg, arguments.ranks), rows, device)
    if arguments.json:
        print(json.dumps(_numbers(result, rows, device, fitting, changes)))
    else:
        _show(result, rows, device, arguments.ranks, changes)
    return fitting


def _device(cfg: DictConfig, arguments: argparse.Namespace) -> Device:
    kind = str(cfg.get("device", "cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.device != "here":
        device = preset(arguments.device, _dtype(cfg))
    elif kind.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device is {kind}, which this machine does not show; say what it will be: --device h100 or a100")
    else:
        device = measured(torch.device(kind), _dtype(cfg))
    if device.kind == "cpu":  # its ranks share one memory
        device = dataclasses.replace(device, memory_bytes=device.memory_bytes / arguments.ranks)
    if arguments.memory_gib is not None:
        device = dataclasses.replace(device, memory_bytes=arguments.memory_gib * GIB)
    return device


def _lengths(cfg: DictConfig, arguments: argparse.Namespace) -> Rows:
    if arguments.prompt_tokens is not None:
        return given_rows(cfg, arguments.prompt_tokens, arguments.privileged_tokens, arguments.completion_tokens)
    try:
        rows = rows_of(cfg, arguments.rows)
    except (InputError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the rows' lengths cannot be read ({reason}); give --prompt-tokens and --privileged-tokens"
        ) from error
    if arguments.completion_tokens is None:
        return rows
    mean, longest = (
        dataclasses.replace(lengths, completion=arguments.completion_tokens) for lengths in (rows.mean, rows.longest)
    )
    return Rows(mean, longest, f"{rows.source.partition(', and')[0]}, and the completions given")


def _numbers(result: Estimate, rows: Rows, device: Device, fitting: bool, changes: list[tuple[str, float]]) -> dict[str, Any]:
    return {
        "fits": fitting,
        "peak_phase": result.peak[0],
        "peak_bytes": result.peak[1],
        **dataclasses.asdict(result),
        "device": dataclasses.asdict(device),
        "rows": dataclasses.asdict(rows),
        "changes": [{"change": change, "peak_bytes": bytes_, "fits": fits(bytes_, device)} for change, bytes_ in changes],
    }


def _show(result: Estimate, rows: Rows, device: Device, ranks: int, changes: list[tuple[str, float]]) -> None:
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
        f"{_HEADROOM_FRAC:.0%} headroom asked",
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
