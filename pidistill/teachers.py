"""Whose weights score the teacher view: the trained model's own, its initial ones, or a moving average of it.

A teacher has the weights only; what it *knows* (privileged information) is in its prompt. Its state is part of a checkpoint.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtune.modules import TransformerDecoder

from pidistill.errors import InputError

LoadCopy = Callable[[], TransformerDecoder]


@runtime_checkable
class Teacher(Protocol):
    """Attributes:

    live: True where the trained model itself is the teacher; only then can the teacher view be trained.
    module: the model that scores the teacher view; None where live.
    """

    live: bool
    module: TransformerDecoder | None

    def attach(self, load_copy: LoadCopy) -> None:
        """Called once, after the trained model is set up; ``load_copy`` loads (and shards) the initial weights again."""

    def update(self, model: nn.Module) -> None:
        """Called after every optimiser step."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold (tensors may be sharded); empty if the teacher can be rebuilt from the config."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


class LiveTeacher:
    """The trained weights themselves, seeing the privileged information (π-Distill, OPSD)."""

    live = True
    module: TransformerDecoder | None = None

    def attach(self, load_copy: LoadCopy) -> None:
        pass

    def update(self, model: nn.Module) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass


class FrozenTeacher(LiveTeacher):
    """The initial weights (or those of `teacher_checkpointer`), never changed."""

    live = False

    def attach(self, load_copy: LoadCopy) -> None:
        self.module = load_copy().requires_grad_(False).eval()


class EMATeacher(FrozenTeacher):
    """φ ← (1−rate)·φ + rate·θ after every optimiser step, starting from the initial weights.

    The average is kept in fp32 whatever the model's dtype: in bf16 a small rate would round every step away.
    """

    def __init__(self, rate: float = 0.05) -> None:
        if not 0.0 < rate <= 1.0:
            raise InputError(
                f"teacher.rate={rate} is outside (0, 1]; it is the share of the new weights in each step's average"
            )
        self.rate = rate

    def attach(self, load_copy: LoadCopy) -> None:
        super().attach(load_copy)
        self._average = {name: p.detach().float() for name, p in self.module.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        _reshard(self.module)
        _reshard(model)
        # Activation checkpointing wraps layers of the trained model and shows in its parameter names.
        trained = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
        for name, parameter in self.module.named_parameters():
            average = self._average[name].lerp_(trained[name].float(), self.rate)
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        _reshard(self.module)
        for name, parameter in self.module.named_parameters():
            self._average[name].copy_(_like(state[name], self._average[name]))
            parameter.copy_(self._average[name])


def _reshard(model: nn.Module) -> None:
    """Back to the shards: `fsdp_reshard_after_forward: false` leaves whole copies, and what is written to those is lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _like(full: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A full tensor with the sharding of ``target``."""
    if isinstance(target, DTensor):
        return distribute_tensor(full.to(target.device), target.device_mesh, target.placements)
    return full.to(target.device)
