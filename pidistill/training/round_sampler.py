"""Sample the rounds of a run: each before its updates or, with `rollout_lag: 1`, one round ahead beside the training.

    lag 0    round n is sampled with the weights after round n − 1; the training waits for it
    lag 1    round n + 1 is sampled with the weights *before* round n's updates, in a second process, while round n trains

The first round of a run is sampled with the present weights in either case, and with lag 1 the second one is sampled with the
same weights. Which weights sample a round depends on the rounds' numbers alone: how fast either process is changes no number.
What is sampled depends on seeds as without a lag. A run that is resumed from a checkpoint without a round ahead (of a finished
run, for example) samples its next round with the present weights.

Recorded log-probs are of the weights that sampled, so that the ratios of a policy gradient, its clipping, `importance_weights`
and `mismatch_mask` see the lag and correct it. Everything else (teacher, KL estimates, advantages from them) is computed with
the weights at the time of the update. A checkpoint holds the round that was sampled ahead.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import fields
from typing import Any

import torch
from omegaconf import DictConfig

from pidistill.data import RecipeData, epoch_order
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.objectives.base import Objective
from pidistill.rollouts import CollectResult, Sampler, rollout_seed
from pidistill.rollouts.calls import settle
from pidistill.teachers import LiveTeacher, Teacher
from pidistill.training.collector import build_collector
from pidistill.training.interrupts import between_updates
from pidistill.training.keys import setting
from pidistill.training.rounds import RoundSizes
from pidistill.training.side_process import SideProcess
from pidistill.types import Rollout, ViewName

Counts = dict[str, float]
SampleRound = Callable[[Any, int], tuple[list[Rollout], Counts]]


class RoundSampler:
    """Sample whole rounds, now or ahead, and the episodes of evaluations.

    Attributes:
        lagged: whether the round that :meth:`next` returned was sampled with older weights than those that first train on it.
    """

    def __init__(
        self, cfg: DictConfig, run: Run, data: RecipeData, sampler: Sampler, sizes: RoundSizes, objective: Objective
    ) -> None:
        self._run, self._data, self._sizes, self._max_steps = run, data, sizes, int(cfg.max_steps)
        self.lagged, self._side = False, None
        self._ahead: Future | None = None
        self._ahead_round = 0
        check_lag(cfg, run, objective)
        if setting(cfg, "rollout_lag"):
            self._side = SideProcess(cfg, run, rollout_device(cfg, run))
            self._play = self._side.collect
        else:
            self._play = build_collector(cfg, sampler, data.tokenizer)

    def next(
        self, round_: int, model: Any, sample: SampleRound, teacher: Callable[[int], Teacher] = lambda step: LiveTeacher()
    ) -> tuple[list[Rollout], Counts]:
        """Return this rank's rollouts of a round and its counts; with a lag, begin the next round with the present weights.

        Args:
            sample: samples the round of a number with the weights it is given, by way of :meth:`collect_groups`. With a lag it
                is called in a thread, while ``model`` trains: it may look at no other weights.
            teacher: whose weights sample at a step.
        """
        with between_updates(self._run.processes):
            if self._side is None:
                with teacher(self._sizes.first_step(round_)).sampling_weights(model) as weights:
                    return sample(weights, round_)
            self.lagged = self._ahead is not None
            if self._ahead is None:
                self._begin(round_, model, sample, teacher)
            rollouts, counts = self._ahead.result()
            self._ahead = None
            if self._sizes.first_step(round_ + 1) < self._max_steps:
                self._begin(round_ + 1, model, sample, teacher)
            return rollouts, counts

    def _begin(self, round_: int, model: Any, sample: SampleRound, teacher: Callable[[int], Teacher]) -> None:
        """Hand over the weights, and sample a round with them in the other process."""
        with teacher(self._sizes.first_step(round_)).sampling_weights(model) as weights:
            self._side.load(weights)
        self._ahead, self._ahead_round = Future(), round_

        def timed() -> tuple[list[Rollout], Counts]:
            began = time.perf_counter()
            rollouts, counts = sample(None, round_)
            return rollouts, dict(counts) | {"time_ahead_s": time.perf_counter() - began}

        threading.Thread(target=settle, args=(self._ahead, timed), daemon=True, name="pidistill round ahead").start()

    def collect_groups(
        self, weights: Any, round_: int, groups: Sequence[tuple[int, int]], view: ViewName, first_member: int = 0
    ) -> CollectResult:
        """Sample `group_size` rollouts of each (group, row) of a round, in ``view``; for the function given to :meth:`next`."""
        members = range(first_member, first_member + self._sizes.group_size)
        arguments = {
            "examples": [self._data.prompts[row][0] for _, row in groups],
            "prompts": [self._data.prompts[row][1] for _, row in groups],
            "view": view,
            "group_size": len(members),
            "groups": [group for group, _ in groups],
            "turn_limit": self._sizes.turn_limit(self._sizes.first_step(round_)),
            "seeds": [rollout_seed(self._run.seed, round_, group, member) for group, _ in groups for member in members],
        }
        return self._play(**arguments) if self._side is not None else self._play(weights, **arguments)

    def groups(self, round_: int) -> list[tuple[int, int]]:
        """Return this rank's (group, row) of a round. A group is never split between ranks."""
        rows, prompts = len(self._data.prompts), self._sizes.prompts
        return self._run.share(list(enumerate(epoch_order(rows, self._run.seed, round_ * prompts, prompts))))

    def collect(self, model: Any, **arguments: Any) -> CollectResult:
        """Play other episodes with the weights that ``model`` has now, such as an evaluation's, after the round under way."""
        with between_updates(self._run.processes):
            if self._side is None:
                return self._play(model, **arguments)
            if self._ahead is not None:
                wait([self._ahead])
            self._side.load(model)
            return self._play(**arguments)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self, round_: int) -> dict[str, Any]:
        """Return the round that was sampled ahead, once it is whole, and the random streams of the process that samples.

        A round that failed is left out: :meth:`next` raises its error, and what was trained until then is saved. So is the one
        behind a ``round_`` that cannot be trained on, and which a resumed run samples again. Nothing is asked of the other
        process, which may have ended.

        Args:
            round_: the round that a run resumed from this state trains first.
        """
        if self._side is None:
            return {}
        ahead = None
        if self._ahead is not None and self._ahead_round == round_ and self._ahead.exception() is None:
            rollouts, counts = self._ahead.result()
            ahead = json.dumps({"rollouts": _as_rows(rollouts, self._data), "counts": counts})
        return {"ahead": ahead, "rng": self._side.random_state()}

    def load_state_dict(self, state: dict[str, Any], round_: int) -> None:
        """Restore what :meth:`state_dict` returned for ``round_``; a run without a lag samples it again, with its weights."""
        if self._side is None or not state:
            return
        self._side.set_random_state(state["rng"])
        if state["ahead"] is not None:
            ahead = json.loads(state["ahead"])
            self._ahead, self._ahead_round = Future(), round_
            self._ahead.set_result((_as_rollouts(ahead["rollouts"], self._data), ahead["counts"]))


_FROM_DATA = {"example", "prompts", "key"}


def _as_rows(rollouts: Sequence[Rollout], data: RecipeData) -> list[dict[str, Any]]:
    """Return rollouts in plain values; the number of a row stands for its example and prompts."""
    numbers = {id(example): number for number, (example, _) in enumerate(data.prompts)}
    names = [field.name for field in fields(Rollout) if field.name not in _FROM_DATA]
    return [{"row": numbers[id(r.example)]} | {name: getattr(r, name) for name in names} for r in rollouts]


def _as_rollouts(rows: Sequence[dict[str, Any]], data: RecipeData) -> list[Rollout]:
    pairs = [(data.prompts[row.pop("row")], row) for row in rows]
    return [Rollout(example=example, prompts=prompts, **row) for (example, prompts), row in pairs]


# ---------------------------------------------------------------------------------------------------- what cannot lag


def rollout_device(cfg: DictConfig, run: Run) -> torch.device:
    """Return the device of the second process: `rollout_device`, by default that of the training."""
    name = cfg.get("rollout_device")
    if not name:
        return run.device
    kind, number = device_place(name)
    found = torch.cuda.device_count()
    if kind == "cuda" and number >= found:
        raise InputError(
            f"rollout_device={name} is not on this machine, where torch sees {found} CUDA devices; choose another one, or "
            "remove the key to take `device`"
        )
    return torch.device(name)


def device_place(name: str, key: str = "rollout_device") -> tuple[str, int]:
    """Return (kind, number) of a device's name, the value of ``key``: cuda is cuda:0."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise InputError(f"{key}={name} must be cpu, cuda or cuda:N with rollout_lag=1; correct it, or remove the lag")
    return kind, int(number or 0)


def check_lag(cfg: DictConfig, run: Run, objective: Objective) -> None:
    """Refuse a lag where the objective needs samples of the present weights, or a second process cannot sample."""
    if not setting(cfg, "rollout_lag"):
        if cfg.get("rollout_device"):
            raise InputError(
                f"rollout_device={cfg.rollout_device} is read with rollout_lag=1 only; set rollout_lag=1, or remove the key"
            )
        return
    own = [key for key in ("teacher_model", "teacher_checkpointer") if cfg.get(key)]
    routes = getattr(objective, "objectives", {})  # of a RoutedObjective
    parts = {f"objective.objectives.{name}": part for name, part in routes.items()} or {"objective": objective}
    needing = [f"{name}.{part.needs_present_samples}" for name, part in parts.items() if part.needs_present_samples]
    denominators = {name: getattr(part, "ratio_denominator", "behaviour") for name, part in parts.items()}
    others = [f"{name}.ratio_denominator={told}" for name, told in denominators.items() if told != "behaviour"]
    if run.processes > 1:
        why = f"samples beside one training process, but this run has {run.processes}; start one process"
    elif needing:
        why = (
            f"trains on samples of weights that are one round old, but {needing[0]} needs samples of the present weights; "
            "change it"
        )
    elif others and not cfg.get("importance_weights"):
        why = (
            f"needs a ratio to the log-probs of the weights that sampled, and {others[0]} uses others; set it to behaviour, "
            "or add importance_weights"
        )
    elif objective.on_policy_frac == 0.0:
        why = "samples ahead, but this objective trains on the dataset's completions; choose another objective"
    elif cfg.model.get("quantize_base"):
        why = "shares plain weights, but model.quantize_base=True stores them in 4 bits; set it to False"
    elif own and any(objective.samples_from_teacher_weights(step) for step in range(int(cfg.max_steps))):
        why = f"samples with the trained model, but at objective.alpha=0 the model of {own[0]} samples; keep alpha above 0"
    else:
        return
    raise InputError(f"rollout_lag=1 {why}, or set rollout_lag=0")
