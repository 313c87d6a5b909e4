"""Take optimiser steps: clipped, and skipped and counted where the loss or the gradient is not finite."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchtune import utils
from torchtune.modules.peft import get_adapter_params

from pidistill.components import resolve
from pidistill.config import build
from pidistill.distributed.run import Run
from pidistill.distributed.tensor_parallel import complete_gradients
from pidistill.errors import InputError, bounded_repr
from pidistill.models.empty import shared_empty_model
from pidistill.models.protocol import Decoder
from pidistill.training.keys import setting
from pidistill.training.optimizers import (
    check_clipping,
    clear_gradients,
    clip_gradients,
    cpu_offload,
    keep_second_moments_above_zero,
    kernel_arguments,
    set_group_value,
    settings,
    use_settings,
)

log = utils.get_logger("INFO")

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """Say what became of one optimiser step."""

    grad_norm: float  # before clipping
    lr: float
    applied: bool  # False where the step was skipped
    nonfinite_steps: int  # skipped so far
    empty_steps: int  # skipped so far


class Updates:
    """Apply accumulated gradients; skip and count a step whose loss or gradient is not finite, or that has no token."""

    def __init__(self, cfg: DictConfig, run: Run, model: nn.Module) -> None:
        self.run, self.model = run, model
        trained = [p for p in model.parameters() if p.requires_grad]
        kernel = kernel_arguments(cfg.optimizer, cfg.get("tensor_parallel_dim") or 1)
        self.optimizer: Optimizer = build(cfg.optimizer, trained, **kernel)
        self.scheduler: LRScheduler | None = build(cfg.lr_scheduler, self.optimizer) if cfg.get("lr_scheduler") else None
        self.clip_grad_norm = float(cfg.get("clip_grad_norm") or math.inf)
        self._settings = settings(self.optimizer)
        check_clipping(self.optimizer, self.clip_grad_norm)
        keep_second_moments_above_zero(self.optimizer)
        self.max_nonfinite_steps = setting(cfg, "max_nonfinite_steps")
        self.nonfinite_steps = self.nonfinite_in_a_row = self.empty_steps = 0

    def apply_settings(self, scheduler: dict[str, Any] | None, kind: str | None) -> None:
        """Restore the scheduler's position after a resume, and use the config's lr, weight decay and schedule.

        Args:
            scheduler: the checkpoint's state of it.
            kind: name of the scheduler class that wrote it, where it is known.
        """
        changes = use_settings(self.optimizer, self._settings)
        if self.scheduler is not None:
            name, by_factor = type(self.scheduler).__name__, isinstance(self.scheduler, LambdaLR)
            if kind not in (None, name):
                raise InputError(
                    f"the checkpoint holds the state of {kind} and lr_scheduler builds {name}; resume with the "
                    "lr_scheduler that it was trained with, or set another output_dir"
                )
            if not by_factor and any(change.startswith("optimizer.lr ") for change in changes):
                raise InputError(
                    f"a changed optimizer.lr cannot reach {name}, which derives each rate from the last ({changes[0]}); resume "
                    "with the old optimizer.lr, or set another output_dir"
                )
            if not by_factor:
                _check_schedule(name, self.scheduler, scheduler)
            base = list(self.scheduler.base_lrs) if by_factor else []  # as configured; the checkpoint brings its own
            self.scheduler.load_state_dict(scheduler)
            if by_factor:
                self._recompute_lr(base)
        if changes:
            log.warning(f"resumed with changed settings, in force from here on: {', '.join(changes)}")

    def _recompute_lr(self, base: list[Any]) -> None:
        """Write base lr × factor of the present step into the groups, as LambdaLR does at every step."""
        factors = [factor(self.scheduler.last_epoch) for factor in self.scheduler.lr_lambdas]
        rates = [lr * factor for lr, factor in zip(base, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            set_group_value(group, "lr", rate)
        self.scheduler.base_lrs, self.scheduler._last_lr = base, rates

    def step(
        self, loss: float, tokens: int, dump: Callable[[Path], None], step: int, *, supervised_term: bool = False
    ) -> StepResult:
        """Clip and step. ``loss`` and ``tokens`` are global, so that all ranks decide alike; ``dump`` writes this rank's batch.

        Without policy tokens there is nothing to learn, and the optimiser's momentum and weight decay must not move weights;
        except where there is a ``supervised_term``, whose tokens are not among ``tokens``.
        """
        complete_gradients(self.model)
        grad_norm = clip_gradients(self.model.parameters(), self.clip_grad_norm)
        lr = float(self.optimizer.param_groups[0]["lr"])  # torchao's is a tensor that the scheduler writes into
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        empty = tokens == 0 and not supervised_term
        applied = finite and not empty
        self.empty_steps += finite and empty
        if applied:
            self.optimizer.step()
            self.nonfinite_in_a_row = 0
        elif not finite:
            self._count_nonfinite(loss, grad_norm, dump, step)
        clear_gradients(self.optimizer)
        if self.scheduler is not None:
            self.scheduler.step()
        return StepResult(grad_norm, lr, applied, self.nonfinite_steps, self.empty_steps)

    def _count_nonfinite(self, loss: float, grad_norm: float, dump: Callable[[Path], None], step: int) -> None:
        self.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        path = self.run.output_dir / f"nonfinite_step_{step}_rank_{self.run.rank}.jsonl"
        if self.run.is_first:
            dump(path)
        log.warning(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}; its batch is in {path}")
        if self.nonfinite_in_a_row >= self.max_nonfinite_steps:
            raise InputError(
                f"{self.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite (last: loss {loss}, "
                f"gradient norm {grad_norm}); lower optimizer.lr or objective.beta, or raise max_nonfinite_steps; batches are "
                f"in {self.run.output_dir}/nonfinite_step_*.jsonl"
            )


def check_updates(cfg: DictConfig) -> None:
    """Refuse an optimizer and a schedule that :class:`Updates` cannot step, before weights are loaded.

    Both are built on parameters of one element, of as many dimensions as those that are trained. The optimizer in host memory
    needs a GPU's weights, and is left to :func:`pidistill.training.optimizers.cpu_offload`.
    """
    if not cfg.get("optimizer"):
        return
    stand_in = resolve(cfg.optimizer._component_) is cpu_offload  # it steps with another optimizer, which has the same settings
    parameters = [
        nn.Parameter(torch.zeros([1] * dimensions)) for dimensions in _trained_dimensions(shared_empty_model(cfg.model))
    ]
    optimizer = torch.optim.SGD(parameters, lr=1.0) if stand_in else build(cfg.optimizer, parameters)
    _check_step("optimizer", optimizer, "torch.optim.AdamW")
    if not cfg.get("lr_scheduler"):
        return
    scheduler = build(cfg.lr_scheduler, optimizer)
    _check_step("lr_scheduler", scheduler, "one of pidistill.training.lr_schedules")
    total, steps = getattr(scheduler, "total_steps", None), cfg.get("max_steps")
    if isinstance(total, int) and steps is not None and total < steps:
        raise InputError(
            f"lr_scheduler.total_steps={total} of {type(scheduler).__name__} ends before max_steps={steps}, and it has no rate "
            f"behind its end; set lr_scheduler.total_steps={steps}"
        )


def _check_step(key: str, made: Any, other: str) -> None:
    """Refuse an optimizer or scheduler whose ``step`` wants more than recipes give, which is nothing."""
    wanted = [
        p.name for p in inspect.signature(made.step).parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    if wanted:
        raise InputError(
            f"{key}._component_ builds {type(made).__name__}, whose step() needs {wanted[0]}, and a recipe gives it nothing; "
            f"set {key}._component_ to {other}"
        )


def _trained_dimensions(model: Decoder) -> list[int]:
    """Return the numbers of dimensions that trained parameters have: the adapters' where there are some, else all."""
    trained = get_adapter_params(model) or dict(model.named_parameters())
    return sorted({parameter.dim() for parameter in trained.values()})


# Attributes that torch's schedulers make from arguments of another name, and which stay the same during a run.
_FROM_ARGUMENTS = {"_milestones", "_schedule_phases", "max_lrs", "total_size", "step_ratio"}


def _check_schedule(name: str, scheduler: LRScheduler, saved: Mapping[str, Any]) -> None:
    """Refuse arguments of a scheduler that are not those of its ``saved`` state: that state would replace them."""
    names = inspect.signature(type(scheduler)).parameters.keys() - {"optimizer", "last_epoch"} | _FROM_ARGUMENTS
    ours = scheduler.state_dict()
    for key in sorted(names & ours.keys() & saved.keys()):
        if ours[key] != saved[key]:
            raise InputError(
                f"a changed lr_scheduler.{key.removeprefix('_')} cannot reach {name}, which derives each rate from the last "
                f"({bounded_repr(saved[key])} -> {bounded_repr(ours[key])}); resume with the old lr_scheduler, or set another "
                "output_dir (a run that is to be extended needs a schedule of pidistill.training.lr_schedules from its start)"
            )
    parts = getattr(scheduler, "_schedulers", [])  # of SequentialLR and ChainedScheduler
    for part, state in zip(parts, saved.get("_schedulers") or [], strict=False):
        if not isinstance(part, LambdaLR):
            _check_schedule(type(part).__name__, part, state)


def crossed(every: int | None, before: int, now: int) -> bool:
    """Return True if a multiple of ``every`` lies in (before, now]; never for None or 0."""
    return bool(every) and now // every > before // every


def mark_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item, and whether it is the last one."""
    marked = [(item, False) for item in items]
    yield from marked[:-1]
    if marked:
        yield marked[-1][0], True


def add_gradients(model: nn.Module, loss: Tensor, ranks: int, *, last: bool) -> None:
    """Add the gradients of a micro-batch to those of the optimiser step.

    FSDP2 takes the mean over ranks, and the loss is a share of the mean over all tokens of the step already. With replicas
    (`data_parallel_replicate_dim`) every micro-batch is added up over the ranks of a replica, and only the ``last`` one of the
    step brings the sum of all of them to the other replicas.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    (loss * ranks).backward()
