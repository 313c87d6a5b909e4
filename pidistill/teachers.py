"""Say whose weights score the teacher view: the trained model's own, its initial ones, an average, a mixture, or another's.

A teacher has the weights only; what it *knows* (privileged information) is in its prompt. Its state is part of a checkpoint.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtune.modules.peft import disable_adapter

from pidistill.data.routes import route_of
from pidistill.errors import InputError, check_choice, check_share
from pidistill.models.adapters import has_adapters
from pidistill.models.protocol import Decoder
from pidistill.types import Example, Rollout, RolloutKey

LoadCopy = Callable[[], Decoder]


@dataclass(frozen=True)
class MixturePart:
    """Hold one summand of a teacher's logits: ``share`` times those of ``module``, its LoRA adapters on or off.

    memory: hidden states computed before, where the weights never change.
    reads: which rollouts the part scores; None is all of them.
    """

    share: float
    module: Decoder
    adapters: bool = True
    memory: "HiddenMemory | None" = None
    reads: Callable[[Rollout], bool] | None = None

    @contextmanager
    def weights(self) -> Iterator[Decoder]:
        """Yield the module as this part computes, to sample or score with inside the `with`."""
        if self.adapters:
            yield self.module
            return
        if not has_adapters(self.module):
            raise InputError(NO_ADAPTERS)
        with disable_adapter(self.module):
            yield self.module


NO_ADAPTERS = (
    "the teacher is the trained model without its LoRA adapters, and the model has none; set `model` to a lora_ builder "
    "(torchtune.models.llama3.lora_llama3, torchtune.models.qwen2.lora_qwen2), or another teacher"
)


@runtime_checkable
class Teacher(Protocol):
    """Say whose weights score the teacher view. A teacher subclasses this and says what differs.

    The defaults are those of a teacher that holds no weights and no state, and can sample.
    """

    live: bool = False  # True where the trained model itself is the teacher; only then can the teacher view be trained
    own_weights: bool = False  # True where it has weights beside the trained model's, which can be another checkpoint's
    averages: bool = False  # True where it adds small steps to its own weights, which must not be rounded to `compute_dtype`
    can_sample: bool = True  # False where its distribution is no single model's, so that the sampler cannot draw from it

    def attach(self, load_copy: LoadCopy) -> None:
        """Take what is needed once the trained model is set up; ``load_copy`` loads (and shards) the initial weights again."""
        return None

    def update(self, model: nn.Module) -> None:
        """Follow the trained model after an optimiser step."""
        return None

    def mixture(self, model: Decoder) -> list[MixturePart]:
        """Return the parts whose logits add up to the teacher's, ``model`` being the trained one; their shares sum to 1."""
        ...

    def sampling_weights(self, model: Decoder) -> AbstractContextManager[Decoder]:
        """Return the context in which the teacher's weights sample."""
        (part,) = self.mixture(model)
        return part.weights()

    def names(self, rollouts: Sequence[Rollout]) -> list[str] | None:
        """Return which of several teachers scores each rollout, for metrics under its name; None where there is one."""
        return None

    def balance(self, rollouts: Sequence[Rollout], sums: Callable[[dict[str, float]], dict[str, float]]) -> None:
        """Write onto each of this rank's rollouts of a step how much it counts; ``sums`` adds named numbers over all ranks."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold (tensors may be sharded); empty if the teacher can be rebuilt from the config."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what :meth:`state_dict` returned."""
        return None


class LiveTeacher(Teacher):
    """Teach with the trained weights themselves, seeing the privileged information (π-Distill, OPSD)."""

    live = True

    def mixture(self, model: Decoder) -> list[MixturePart]:
        return [MixturePart(1.0, model)]


class HiddenMemory:
    """Keep hidden states [policy tokens, H] of rollouts that a teacher has read before, for weights that never change.

    It saves forwards where rollouts are scored several times: for the behaviour's KL and for the update, in several updates of
    a round, or in every epoch (completions of a dataset). A micro-batch is read again if any rank lacks one of its rollouts.
    Hidden states are removed with their rollout, and those that do not fit are not kept. A resumed run starts with an empty
    memory and may pack differently, so that the last digits may differ.

    Args:
        gib: host memory per rank for it.
    """

    def __init__(self, gib: float) -> None:
        if not 0.0 <= gib < float("inf"):
            raise InputError(f"teacher.cache_gib={gib} must be a number of at least 0: host memory for hidden states, in GiB")
        self._bytes = int(gib * 2**30)
        self._kept: WeakKeyDictionary[RolloutKey, torch.Tensor] = WeakKeyDictionary()

    def of(
        self, rollouts: Sequence[Rollout], none: Float[Tensor, "0 H"], read: Callable[[], Float[Tensor, "N H"]]
    ) -> Float[Tensor, "N H"]:
        """Return hidden states of the policy tokens: the kept ones if every rank has all of its own, else from ``read``."""
        kept = [self.kept(rollout) for rollout in rollouts]
        if on_all_ranks(all(hidden is not None for hidden in kept), none.device):
            return torch.cat([none, *(hidden.to(none.device) for hidden in kept)])
        read_now = read().split([rollout.policy_tokens for rollout in rollouts])
        self.keep(rollouts, read_now)
        # What is kept stands, since another packing rounds differently.
        parts = [new if old is None else old.to(none.device) for old, new in zip(kept, read_now, strict=True)]
        return torch.cat([none, *parts])

    def kept(self, rollout: Rollout) -> Float[Tensor, "n H"] | None:
        """Return what is kept of a rollout; None where nothing is."""
        return self._kept.get(rollout.key)

    def keep(self, rollouts: Sequence[Rollout], parts: Sequence[Float[Tensor, "_ H"]]) -> None:
        """Keep what has been read of each rollout, as far as it fits."""
        used = sum(hidden.nbytes for hidden in self._kept.values())
        for rollout, hidden in zip(rollouts, parts, strict=True):
            if rollout.key not in self._kept and used + hidden.nbytes <= self._bytes:
                self._kept[rollout.key] = hidden.cpu().clone()
                used += hidden.nbytes


def on_all_ranks(yes: bool, device: torch.device) -> bool:
    """Return whether ``yes`` holds on every rank: all ranks or none must call a collective, such as a sharded forward."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return yes
    answer = torch.tensor(int(yes), device=device)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer)


class AdapterOffTeacher(Teacher):
    """Teach with the trained model, its LoRA adapters switched off: the initial weights, without a second copy of them.

    Args:
        cache_gib: see :class:`HiddenMemory`; 0 keeps nothing.
    """

    def __init__(self, cache_gib: float = 0.0) -> None:
        self._memory = HiddenMemory(cache_gib) if cache_gib else None

    def mixture(self, model: Decoder) -> list[MixturePart]:
        return [MixturePart(1.0, model, adapters=False, memory=self._memory)]


class FrozenTeacher(Teacher):
    """Teach with the initial weights, never changed; with `teacher_checkpointer` (and `teacher_model`) another model's.

    Another model may be of another size and have more or fewer padded rows in its output, see :mod:`pidistill.scoring.score`;
    its tokenizer must be the student's.

    Args:
        cache_gib: see :class:`HiddenMemory`; 0 keeps nothing.
    """

    own_weights = True

    def __init__(self, cache_gib: float = 0.0) -> None:
        self._memory = HiddenMemory(cache_gib) if cache_gib else None

    def attach(self, load_copy: LoadCopy) -> None:
        self.module = _frozen(load_copy())

    def mixture(self, model: Decoder) -> list[MixturePart]:
        return [MixturePart(1.0, self.module, memory=self._memory)]


class TrustRegionTeacher(Teacher):
    """Teach with logits (1 − live_share)·reference + live_share·live, a step from the reference towards the student.

    SDPO's (arXiv 2601.20802) at .01. The reference is the initial model or that of `teacher_checkpointer`; both see the teacher
    view, and neither gets gradient. A distribution of two models' logits is no model's own: it scores, and cannot sample.
    """

    own_weights = True
    can_sample = False

    def __init__(self, live_share: float = 0.01) -> None:
        check_share("teacher.live_share", live_share, "use FrozenTeacher for 0, LiveTeacher for 1", "(0, 1)")
        self.live_share = live_share

    def attach(self, load_copy: LoadCopy) -> None:
        self.module = _frozen(load_copy())

    def mixture(self, model: Decoder) -> list[MixturePart]:
        return [MixturePart(1.0 - self.live_share, self.module), MixturePart(self.live_share, model)]

    def sampling_weights(self, model: Decoder) -> AbstractContextManager[Decoder]:
        raise InputError("a trust-region teacher mixes two models' logits and cannot sample; choose another teacher")


class EMATeacher(Teacher):
    """Teach with an average, φ ← (1−rate)·φ + rate·θ after every optimiser step, starting from the initial weights.

    The average is kept in fp32 with any dtype of the model: in bf16 a small rate would round every step away. Where the weights
    are in fp32, as in mixed precision, they are the average themselves, without a copy. Of a model with LoRA adapters only the
    adapters are averaged, because the other weights never change.
    """

    own_weights = True
    averages = True

    def __init__(self, rate: float = 0.05) -> None:
        check_share("teacher.rate", rate, "it is the share of the new weights in each step's average", "(0, 1]")
        self.rate = rate

    def mixture(self, model: Decoder) -> list[MixturePart]:
        return [MixturePart(1.0, self.module)]

    def attach(self, load_copy: LoadCopy) -> None:
        module = load_copy()
        self._average = {name: p.detach().float() for name, p in module.named_parameters() if p.requires_grad}
        self.module = _frozen(module)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        _reshard(self.module)
        _reshard(model)
        trained = _trained_parameters(model)
        for name, average in self._average.items():
            average.lerp_(trained[name].float(), self.rate)
            self.module.get_parameter(name).copy_(average)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        _reshard(self.module)
        for name, average in self._average.items():
            average.copy_(_like(state[name], average))
            self.module.get_parameter(name).copy_(average)


class SnapshotTeacher(Teacher):
    """Teach with a copy of the trained weights that is taken every ``sync_steps`` optimiser steps; at first the initial ones.

    A copy, not an average: between two copies nothing moves, and a resumed run takes them at the same steps.
    """

    own_weights = True

    def __init__(self, sync_steps: int = 20) -> None:
        if type(sync_steps) is not int or sync_steps < 1:
            raise InputError(f"teacher.sync_steps={sync_steps} must be a whole number of at least 1: steps between two copies")
        self.sync_steps, self._steps = sync_steps, 0

    def attach(self, load_copy: LoadCopy) -> None:
        module = load_copy()
        self._copied = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.module = _frozen(module)

    def mixture(self, model: Decoder) -> list[MixturePart]:
        return [MixturePart(1.0, self.module)]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self._steps += 1
        if self._steps % self.sync_steps:
            return
        _reshard(self.module)
        _reshard(model)
        trained = _trained_parameters(model)
        for name in self._copied:
            target, weight = self.module.get_parameter(name), trained[name]
            # In mixed precision one process shards what it trains, and not this teacher.
            whole = isinstance(weight, DTensor) and not isinstance(target, DTensor)
            target.copy_(weight.full_tensor() if whole else weight)

    def state_dict(self) -> dict[str, Any]:
        weights = {name: self.module.get_parameter(name).detach() for name in self._copied}
        return weights | {"steps": torch.tensor(self._steps)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        _reshard(self.module)
        if "steps" not in state:
            raise InputError("the checkpoint is of a run with another teacher than SnapshotTeacher; resume with the same one")
        self._steps = int(state["steps"])
        for name in self._copied:
            target = self.module.get_parameter(name)
            target.copy_(_like(state[name], target))


class RoutedTeacher(Teacher):
    """Let a key of each row name the teacher that scores it: one teacher per row, never an average (MOPD, arXiv 2601.02780).

    Teachers may be of any kind but ServedTeacher and RoutedTeacher, and of any size, with the student's tokenizer. Their
    weights are named at the top level of the config: `teacher_models` and `teacher_checkpointers`, each a mapping from the
    name; a name in neither has `model`'s initial weights.

    Args:
        key: where a row says it, a key of ``Example.data``.
        teachers: name → teacher.
        default: the name for rows without the key; None refuses such a row. A row with an unknown name is always refused.
        balance: "tokens": one mean over all tokens of the step; "teachers": a mean per teacher, and the mean of these, so that
            a teacher with few tokens counts as much as one with many (Open-MOPD, arXiv 2608.19098).
    """

    own_weights = True
    can_sample = False

    def __init__(self, key: str, teachers: Mapping[str, Teacher], default: str | None = None, balance: str = "tokens") -> None:
        teachers = {str(name): teacher for name, teacher in teachers.items()}
        default = None if default is None else str(default)
        if not teachers or (default is not None and default not in teachers):
            known = ", ".join(teachers) or "none"
            raise InputError(
                f"teacher.default={default} must be null or one of teacher.teachers ({known}), which must not be empty"
            )
        check_choice("teacher.balance", balance, ("tokens", "teachers"))
        if named := [name for name in teachers if "/" in name]:
            raise InputError(f"teacher.teachers has the name {named[0]!r}; names of states hold /, so leave it out")
        if any(isinstance(teacher, RoutedTeacher) for teacher in teachers.values()):
            raise InputError("teacher.teachers holds a RoutedTeacher; name all teachers in one")
        self.key, self.teachers, self.default, self._balance = key, teachers, default, balance

    def name_of(self, example: Example) -> str:
        """Return the name of the example's teacher; InputError where it has none."""
        return route_of(example, self.key, self.teachers, self.default, "teacher")

    def attach(self, load_copy: Callable[..., Decoder]) -> None:
        for name, teacher in self.teachers.items():
            teacher.attach(partial(load_copy, teacher=teacher, name=name))

    def update(self, model: nn.Module) -> None:
        for teacher in self.teachers.values():
            teacher.update(model)

    def mixture(self, model: Decoder) -> list[MixturePart]:
        return [
            replace(part, reads=lambda rollout, name=name: self.name_of(rollout.example) == name)
            for name, teacher in self.teachers.items()
            for part in teacher.mixture(model)
        ]

    def sampling_weights(self, model: Decoder) -> AbstractContextManager[Decoder]:
        raise InputError("a RoutedTeacher is several models and cannot sample; choose another teacher")

    def names(self, rollouts: Sequence[Rollout]) -> list[str]:
        return [self.name_of(rollout.example) for rollout in rollouts]

    def balance(self, rollouts: Sequence[Rollout], sums: Callable[[dict[str, float]], dict[str, float]]) -> None:
        if self._balance == "tokens":
            return
        tokens: dict[str, float] = {}
        for rollout, name in zip(rollouts, self.names(rollouts), strict=True):
            tokens[name] = tokens.get(name, 0.0) + rollout.policy_tokens
        tokens = {name: count for name, count in sums(tokens).items() if count}
        for rollout, name in zip(rollouts, self.names(rollouts), strict=True):
            rollout.balance = math.fsum(tokens.values()) / (len(tokens) * tokens[name]) if name in tokens else 1.0

    def state_dict(self) -> dict[str, Any]:
        states = {name: teacher.state_dict() for name, teacher in self.teachers.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, teacher in self.teachers.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            if bool(own) != bool(teacher.state_dict()):
                raise InputError(
                    f"the checkpoint has {'a' if own else 'no'} state of teacher.teachers.{name}, and {type(teacher).__name__} "
                    f"{'has none' if own else 'needs it'}; resume with the teachers that the run had"
                )
            if own:
                teacher.load_state_dict(own)


def _trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name, without what activation checkpointing puts into the names."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}


def _frozen(module: Decoder) -> Decoder:
    return module.requires_grad_(False).eval()


def _reshard(model: nn.Module) -> None:
    """Return to the shards: `fsdp_reshard_after_forward: false` leaves whole copies, and what is written to those is lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _like(full: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return a full tensor with the sharding of ``target``."""
    if isinstance(target, DTensor):
        return distribute_tensor(full.to(target.device), target.device_mesh, target.placements)
    return full.to(target.device)
