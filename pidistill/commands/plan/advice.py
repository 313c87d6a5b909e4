"""Say whether a run fits, and what would make it fit: each kind of change by itself, and several where one is not enough."""

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from pidistill.commands.places import learns_demonstrations
from pidistill.commands.plan.devices import Device
from pidistill.commands.plan.lengths import Lengths, RowLengths
from pidistill.commands.plan.memory import chunk_tokens, memory, peak
from pidistill.commands.plan.reading import dtype_of, setup_of, shape_of, workload_of
from pidistill.components import resolve
from pidistill.config import build
from pidistill.errors import InputError
from pidistill.models.adapters import has_adapters
from pidistill.models.empty import shared_empty_model
from pidistill.training.keys import setting

# Room for lengths that differ, for gaps of the allocator, and for what the estimate misses.
HEADROOM_FRAC = 0.1
_ONE_TOKEN = Lengths(1, 1, 1, 1)


def fits(bytes_: float, device: Device) -> bool:
    """Return True if the device holds so many bytes and some more."""
    return bytes_ * (1 + HEADROOM_FRAC) <= device.memory_bytes


@dataclass(frozen=True)
class PlannedRun:
    """Hold a config on a number of ranks; a change makes another one of it."""

    cfg: DictConfig
    ranks: int
    changes: tuple[str, ...] = ()

    def with_(self, *overrides: str, ranks: int | None = None) -> "PlannedRun":
        """Return the run with overrides, or on another number of ranks."""
        cfg = OmegaConf.merge(self.cfg, OmegaConf.from_dotlist(list(overrides)))
        words = (*overrides, *([f"--ranks {ranks}"] if ranks else []))
        return PlannedRun(cfg, ranks or self.ranks, (*self.changes, " ".join(words)))


def advice(run: PlannedRun, rows: RowLengths, device: Device) -> list[tuple[str, float]]:
    """Return (change, peak bytes with it): one change of each kind that helps, and several where no single one is enough."""

    def size(run: PlannedRun) -> float:
        setup, longest = setup_of(run.cfg, run.ranks, device.kind), workload_of(run.cfg, rows.longest, run.ranks)
        return peak(memory(setup, longest))[1]

    def enough(steps: list[PlannedRun]) -> tuple[PlannedRun, float]:
        """Return the first step that fits, else the last."""
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


def _fewer_rows_sampled(run: PlannedRun, device: Device) -> list[PlannedRun]:
    if learns_demonstrations(run.cfg):
        return []
    rows = -(-run.cfg.prompts_per_round // run.ranks) * run.cfg.group_size
    return [run.with_(f"sampler.max_batch_size={n}") for n in _halves(run.cfg.sampler.get("max_batch_size") or rows)]


def _packed(run: PlannedRun, device: Device) -> list[PlannedRun]:
    return [run.with_("packing=tree")] if setting(run.cfg, "packing") == "padded" else []


def _smaller_micro_batches(run: PlannedRun, device: Device) -> list[PlannedRun]:
    return [run.with_(f"micro_batch_tokens={n}") for n in _halves(setting(run.cfg, "micro_batch_tokens"), least=256)]


def _smaller_chunks(run: PlannedRun, device: Device) -> list[PlannedRun]:
    """Return runs whose head computes fewer logits at once."""
    model, views = shape_of(run.cfg.model, dtype_of(run.cfg)), len(workload_of(run.cfg, _ONE_TOKEN, run.ranks).views)
    size = run.cfg.get("score_chunk_tokens") or chunk_tokens(model, views, device.kind)
    return [run.with_(f"score_chunk_tokens={n}") for n in _halves(size, least=32)]


def _checkpointing(run: PlannedRun, device: Device) -> list[PlannedRun]:
    return [] if run.cfg.get("enable_activation_checkpointing") else [run.with_("enable_activation_checkpointing=true")]


def _no_second_copy(run: PlannedRun, device: Device) -> list[PlannedRun]:
    """Return a run whose LoRA model without its adapters is its own frozen teacher, where the teacher is a second copy."""
    own = run.cfg.get("teacher") and build(run.cfg.teacher).own_weights and not run.cfg.get("teacher_checkpointer")
    needless = own and has_adapters(shared_empty_model(run.cfg.model))
    return [run.with_("teacher._component_=pidistill.teachers.AdapterOffTeacher")] if needless else []


def _more_ranks(run: PlannedRun, device: Device) -> list[PlannedRun]:
    """Return runs on more GPUs; ranks on a CPU share its memory, so that more of them save nothing."""
    replicas = setting(run.cfg, "data_parallel_replicate_dim")
    counts = [replicas * n for n in (2, 4, 8)]
    return [run.with_(ranks=n) for n in counts if n > run.ranks and device.kind == "cuda"]


def _one_replica(run: PlannedRun, device: Device) -> list[PlannedRun]:
    """Return a run whose model is shared by all GPUs, of all machines."""
    several = setting(run.cfg, "data_parallel_replicate_dim") > 1 and device.kind == "cuda"
    return [run.with_("data_parallel_replicate_dim=1")] if several else []


def _offload(run: PlannedRun, device: Device) -> list[PlannedRun]:
    useful = device.kind == "cuda" and run.ranks > 1 and not run.cfg.get("fsdp_cpu_offload")
    return [run.with_("fsdp_cpu_offload=true")] if useful else []


def _bf16(run: PlannedRun, device: Device) -> list[PlannedRun]:
    """Return a run with products in bf16, then one with weights in bf16, which lose most steps of a small learning rate."""
    if setting(run.cfg, "dtype") != "fp32":
        return []
    mixed = [] if run.cfg.get("compute_dtype") else [run.with_("compute_dtype=bf16")]
    return [*mixed, run.with_("dtype=bf16", "compute_dtype=null")]


def _lora(run: PlannedRun, device: Device) -> list[PlannedRun]:
    """Return a run with torchtune's LoRA variant of the builder, where there is one."""
    module, _, name = run.cfg.model._component_.rpartition(".")
    try:
        resolve(f"{module}.lora_{name}")
    except InputError:
        return []
    sizes = ("model.lora_attn_modules=[q_proj,v_proj]", "model.lora_rank=8", "model.lora_alpha=16")
    return [run.with_(f"model._component_={module}.lora_{name}", *sizes)]


# First the changes that cost only time, last those that change the method.
KINDS = (
    _fewer_rows_sampled, _packed, _smaller_micro_batches, _smaller_chunks, _checkpointing, _no_second_copy, _one_replica,
    _more_ranks, _offload, _bf16, _lora,
)  # fmt: skip


def _halves(largest: int, least: int = 1) -> list[int]:
    return [largest >> n for n in range(1, largest.bit_length()) if largest >> n >= least]
