"""Save checkpoints and resume from them exactly. A checkpoint is a folder `output_dir/step_N`, complete or absent:

    the weights in their own format, as the configured torchtune checkpointer writes them (transformers loads them); of a
    model with LoRA adapters the merged ones (of 4-bit weights, those that the forward computes with),
    adapter/ where there are LoRA adapters: only the adapters, in PEFT's format, for the base in transformers,
    the files that came with the initial checkpoint (config.json, tokenizer), and
    training_state.pt: optimizer, scheduler, adapters, teacher, step, round, random state of every rank, the objective's name,
    the round that was sampled ahead (`rollout_lag: 1`), and the version of this format.

`output_dir/latest` points to the newest. Checkpoints fall on round ends, so no half-used rollouts need saving. `keep_last: N`
removes all but the newest N, and the one that the process resumed from. Every file is on the disk before the link moves. A
new checkpoint replaces one of the same name only if both hold the same weights; any other is kept as `step_N_replaced_M`.
"""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from safetensors import SafetensorError
from torch import nn
from torchtune import training, utils
from torchtune.modules.peft import get_adapter_state_dict

from pidistill.data.row_marks import rows_mark
from pidistill.distributed.run import Run
from pidistill.errors import InputError, one_line
from pidistill.models.adapter_dir import base_config, with_adapter_dir
from pidistill.models.adapters import has_adapters, merged
from pidistill.models.hf_folder import INDEX
from pidistill.models.hf_format import FAMILIES
from pidistill.models.nf4 import whole
from pidistill.models.peft_format import FOLDER
from pidistill.models.peft_format import write as write_adapter
from pidistill.models.progress import show_weights
from pidistill.models.protocol import Decoder, has_own_names
from pidistill.teachers import Teacher
from pidistill.training.disk import check_copyable, remove_outside_copies, remove_tree
from pidistill.training.interrupts import FailedBetweenUpdates, Stopped, received_signal, training_begins
from pidistill.training.load import build_checkpointer
from pidistill.training.optimizers import optimizer_state, restore_optimizer
from pidistill.training.publish import publish, remove_old
from pidistill.training.round_sampler import RoundSampler
from pidistill.training.run_folder import (
    BEGAN,
    LATEST,
    RESUME,
    STATE_FILE,
    holds_run,
    newest_checkpoint,
    record_config,
    step_folder,
    step_folders,
    step_of,
    wants_resume,
)
from pidistill.training.training_state import (
    DAMAGED,
    FORMAT,
    base_mark,
    check_records,
    check_weights,
    random_state,
    read_state,
    set_random_state,
    weight_marks,
)
from pidistill.training.update import Updates, crossed
from pidistill.types import Example, PromptPair

log = utils.get_logger("INFO")

WEIGHTS = (".safetensors", ".bin")  # how the names of files of weights end


def saves_what_was_trained(train: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let a recipe's ``train`` save before its run ends because a round or an evaluation cannot be sampled.

    Both are sampled between updates only, so that all that is saved is whole. An error within an update saves nothing.
    """

    @functools.wraps(train)
    def train_and_save(recipe: Any) -> None:
        try:
            train(recipe)
        except FailedBetweenUpdates as error:
            if recipe._step > recipe._checkpoints.saved_step:
                recipe.save_checkpoint()
            if recipe._step == 0:
                raise
            remedy = f": set {RESUME}=true to continue" if recipe._step < recipe._max_steps else ""
            raise InputError(f"{error}; step {recipe._step} is saved{remedy}") from error

    return train_and_save


class Checkpoints:
    """Load the initial or the newest checkpoint of a run and save new ones.

    A checkpoint of another ``method`` (name of what is trained), or with other values of ``must_match`` (settings that the
    position in the data depends on), is refused on resume. Rows with other content than the checkpoint's are warned of.
    """

    def __init__(
        self,
        cfg: DictConfig,
        run: Run,
        method: str,
        must_match: Mapping[str, int] | None = None,
        prompts: Sequence[tuple[Example, PromptPair]] = (),  # the training rows
    ) -> None:
        self.run, self.method = run, method
        self._rows = rows_mark(prompts)
        self.must_match = {"seed": run.seed, **(must_match or {})}
        self._cfg, self._node = cfg, cfg.checkpointer
        self._every, self._keep_last = cfg.get("save_every_steps"), cfg.get("keep_last")
        self.state: dict[str, Any] | None = None  # the training state that was found on resume
        self._stop, self.saved_step = 0, 0  # 0: no checkpoint was saved yet
        self._recorded = not wants_resume(cfg)
        folder = run.from_main(lambda: self._newest() if wants_resume(cfg) else None)
        if folder is not None:
            self.state = self._read_state(folder)
        else:
            self._begin()
        self._checkpointer = self._open(folder)

    def _begin(self) -> None:
        link = self.run.output_dir / LATEST
        if Path(self._node.get("checkpoint_dir") or "").absolute() == link.absolute():
            raise InputError(
                f"checkpointer.checkpoint_dir={link} is the link that this run moves to each new checkpoint; name the step_N "
                "folder behind it, or set another output_dir"
            )
        if self.run.is_main:
            (self.run.output_dir / BEGAN).touch()  # until the first checkpoint: a resume before it starts over

    def _newest(self) -> Path | None:
        """Return the checkpoint to resume from, or None where the run starts because nothing is saved yet."""
        folder = self.run.output_dir
        newest = newest_checkpoint(folder)
        if newest is not None:
            with self._reading(newest, STATE_FILE):
                check_records(newest / STATE_FILE)
            check_copyable(newest)
            return newest
        if (folder / BEGAN).exists() and not os.path.lexists(folder / LATEST):
            log.warning(f"{folder} holds a run without a checkpoint; it starts again from its first step")
            return None
        if self._cfg.get(RESUME) == "auto" and not holds_run(folder):
            return None
        raise InputError(
            f"{RESUME}={self._cfg.get(RESUME)} but {folder / LATEST} holds no {STATE_FILE}, nor does any step_N beside it; set "
            f"{RESUME}=start_over to move what is there aside and start, or check output_dir"
        )

    def _read_state(self, folder: Path) -> dict[str, Any]:
        with self._reading(folder, STATE_FILE, refusals=InputError):
            state = read_state(folder)
        if state["method"] != self.method:
            raise InputError(
                f"the checkpoint in {folder} was trained with {state['method']}, this config says {self.method}; "
                "set another output_dir, or the objective it was trained with"
            )
        for key, ours in self.must_match.items():
            theirs = state["must_match"].get(key)
            if theirs != ours:
                raise InputError(
                    f"the checkpoint in {folder} was trained with {key}={theirs}, this run has {ours}; the order of the data "
                    "would differ: resume with the old value, or set another output_dir"
                )
        step, last = state["step"], self._cfg.get("max_steps")
        if last is not None and step > last:
            raise InputError(
                f"the checkpoint in {folder} is at step {step}, and max_steps={last} counts the whole run; set it above {step}"
            )
        if self.run.is_main and step == last:
            log.info(f"{folder} is at step {step}, and max_steps={last}: the run is finished, and nothing more is trained")
        if self.run.is_main and state.get("rows_mark", self._rows) != self._rows:
            log.warning(
                f"rows of `dataset` have another content or order than when {folder.name} was saved; the run goes on with the "
                "new ones, and its numbers before and after are of different rows. Set another output_dir to start from step 0"
            )
        return state

    @contextlib.contextmanager
    def _reading(self, folder: Path | None, what: str, refusals: type | tuple = ()) -> Iterator[None]:
        """Say why ``what`` in a checkpoint cannot be read where the block fails to; ``refusals`` pass as they are."""
        try:
            yield
        except DAMAGED as error:
            if folder is None or isinstance(error, refusals):
                raise
            last = step_of(folder) if folder.name.removeprefix("step_").isdecimal() else math.inf  # `latest` may be a folder
            before = [step.name for step in step_folders(self.run.output_dir) if step != folder and step_of(step) < last]
            remedy = f"the run then resumes from {before[-1]}" if before else f"no older one is left: set {RESUME}=start_over"
            fault = "is missing" if what != STATE_FILE and _lacks_file(folder, error) else "is cut short or damaged"
            raise InputError(f"{what} in {folder} {fault} ({one_line(error, 160)}); move {folder} away, {remedy}") from error

    def _open(self, folder: Path | None) -> Any:
        self._writing = self.run.output_dir / ".writing"
        self._source: Path | None = None  # the step whose weights are loaded; None for the initial checkpoint's
        # Read by the checkpointer at construction; only rank 0 writes into it.
        overrides: dict[str, Any] = {"output_dir": str(self._writing)}
        # With adapters the folder's weights are merged ones: the base's come from the initial checkpoint.
        if folder is not None and not self.state.get("adapters"):
            self._source = folder
            overrides |= {"checkpoint_dir": str(folder)}
            if self._node.get("checkpoint_files"):  # else the folder's own index names them
                overrides["checkpoint_files"] = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHTS)
        with self._reading(self._source, "a file of weights or config.json"):
            return build_checkpointer(self._node, self._cfg.model, **overrides)

    def load_weights(self) -> dict[str, Any]:
        """Return the full state dict that the run starts from, on CPU."""
        with self._reading(self._source, "a file of weights"):
            weights = self._checkpointer.load_checkpoint()[training.MODEL_KEY]
            if self._source is not None:
                check_weights(weights, self.state.get("weights") or {})
            self._base = base_mark(weights)
        if self.state is None:
            return with_adapter_dir(self._cfg, self._cfg.model, weights)
        adapters = self.state.get("adapters") or {}
        if adapters and not torch.equal(self._base, self.state["base"]):
            raise InputError(
                f"checkpointer.checkpoint_dir={self._node.get('checkpoint_dir')} holds other weights than the adapters in "
                f"{self.run.output_dir / LATEST} were trained beside; set it to the run's first checkpoint"
            )
        return weights | adapters

    def restore(
        self, model: Decoder, updates: Updates, teacher: Teacher | None, rounds: RoundSampler | None = None
    ) -> dict[str, Any]:
        """Put optimizer, scheduler, teacher, random state and the round that was sampled ahead back.

        Returns:
            {"step", "round"}, zeros for a fresh run.
        """
        training_begins()
        if self.state is None:
            return {"step": 0, "round": 0}
        wanted = has_adapters(model)
        if wanted != bool(self.state.get("adapters")):
            raise InputError(
                f"the checkpoint in {self.run.output_dir / LATEST} was trained {'without' if wanted else 'with'} LoRA "
                "adapters, unlike this config's; resume with the `model` that it was trained with, or set another output_dir"
            )
        with self._reading(step_folder(self.run.output_dir, self.state["step"]), STATE_FILE, refusals=InputError):
            self._restore(model, updates, teacher)
            if rounds is not None:
                rounds.load_state_dict(self.state.get("rounds") or {}, self.state["round"])
        self.saved_step = self.state["step"]
        return {"step": self.state["step"], "round": self.state["round"]}

    def _restore(self, model: Decoder, updates: Updates, teacher: Teacher | None) -> None:
        self._refuse_other_state("lr_scheduler", updates.scheduler is not None, self.state["scheduler"] is not None)
        kept = teacher.state_dict().keys() if teacher is not None else ()
        self._refuse_other_state("teacher", bool(kept), bool(self.state["teacher"]))
        if set(kept) != set(self.state["teacher"]):
            raise InputError(
                f"the checkpoint in {self.run.output_dir / LATEST} has the state of another kind of `teacher`; resume with the "
                "`teacher` that it was trained with, or set another output_dir"
            )
        restore_optimizer(model, updates.optimizer, self.state["optimizer"], self.state.get("optimizer_kind"))
        updates.apply_settings(self.state["scheduler"], self.state.get("scheduler_kind"))
        updates.nonfinite_steps, updates.nonfinite_in_a_row, updates.empty_steps = self.state["skipped_steps"]
        if teacher is not None and self.state["teacher"]:
            teacher.load_state_dict(self.state["teacher"])
        if len(self.state["rng"]) == self.run.processes:
            set_random_state(self.state["rng"][dist.get_rank()])
        else:
            log.warning(f"{len(self.state['rng'])} ranks wrote the checkpoint, this run has {self.run.processes}")

    def _refuse_other_state(self, key: str, wanted: bool, found: bool) -> None:
        if wanted != found:
            link, ours = self.run.output_dir / LATEST, "needs it" if wanted else "has no use for it"
            raise InputError(
                f"the checkpoint in {link} {'has' if found else 'lacks'} a state of `{key}` and this config {ours}; resume "
                f"with the `{key}` that it was trained with, or set another output_dir"
            )

    def record_config(self) -> None:
        """Write the config of a resumed run into its folder; a recipe calls this once nothing can be refused any more.

        A resume that is refused leaves the config.yaml that the saved weights were trained with. A fresh run has written its
        own when it claimed the folder.
        """
        if not self._recorded:
            self.run.from_main(lambda: record_config(self._cfg, self.run.output_dir))
        self._recorded = True

    def due(self, before: int, now: int) -> bool:
        """Return whether to save: a multiple of save_every_steps lies in (before, now], or a signal asks the run to stop."""
        self._stop = self.run.max_of_processes(received_signal())
        return bool(self._stop) or crossed(self._every, before, now)

    def save(
        self,
        step: int,
        round_: int,
        model: Decoder,
        updates: Updates,
        teacher: Teacher | None,
        rounds: RoundSampler | None = None,
    ) -> None:
        """Write `step_N` whole, then move it into place: a kill leaves the previous checkpoint as the newest."""
        self.record_config()  # for a recipe that did not: config.yaml describes the weights beside it
        weights = self._full(model.state_dict())
        optimizer = optimizer_state(model, updates.optimizer, self.run.is_main)
        teacher_state = self._full(teacher.state_dict()) if teacher is not None else {}
        rng: list[Any] = [None] * self.run.processes
        dist.all_gather_object(rng, random_state())
        state = {
            "format": FORMAT,
            "method": self.method,
            "must_match": self.must_match,
            "rows_mark": self._rows,
            "step": step,
            "round": round_,
            "optimizer": optimizer,
            "optimizer_kind": type(updates.optimizer).__name__,
            "scheduler": updates.scheduler.state_dict() if updates.scheduler is not None else None,
            "scheduler_kind": type(updates.scheduler).__name__,
            "skipped_steps": (updates.nonfinite_steps, updates.nonfinite_in_a_row, updates.empty_steps),
            "teacher": teacher_state,
            "rng": rng,
        }
        if rounds is not None and (ahead := rounds.state_dict(round_)):
            state["rounds"] = ahead
        self.run.from_main(lambda: self._write(step, model, weights, state))
        self.saved_step = step
        if self._stop:
            raise Stopped(f"stopped after step {step}, which is saved; set {RESUME}=true to continue", self._stop)

    def _write(self, step: int, model: nn.Module, weights: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Write the whole checkpoint and move it into place. For rank 0."""
        new, adapters = self._writing / "epoch_0", get_adapter_state_dict(weights)
        try:
            remove_tree(self._writing)
            trained = merged(model, weights)
            marks = weight_marks(trained)
            self._checkpointer.save_checkpoint({training.MODEL_KEY: trained}, epoch=0)
            remove_outside_copies(self._source or Path(self._node.get("checkpoint_dir") or ""), new)
            self._write_adapter(model, adapters)
            # A resumed run puts the adapters beside the base's weights again.
            state |= {"adapters": adapters, "base": self._base if adapters else None, "weights": marks}
            (new / STATE_FILE).unlink(missing_ok=True)  # copied along from a resumed folder
            torch.save(state, new / STATE_FILE)
            publish(new, self.run.output_dir, step, marks, self.state["step"] if self.state else 0)
            remove_tree(self._writing)
            remove_old(self.run.output_dir, step, self._keep_last, used=self._started_from())
        except InputError:
            raise
        except (OSError, SafetensorError, RuntimeError) as error:
            before = step_folders(self.run.output_dir)
            kept = f"{before[-1].name} is whole" if before else "no earlier one is there"
            raise InputError(
                f"the checkpoint of step {step} could not be written into {self.run.output_dir} ({one_line(error, 160)}); "
                f"{kept}: free space on the disk, then set {RESUME}=true to continue"
            ) from error

    def _write_adapter(self, model: nn.Module, adapters: dict[str, torch.Tensor]) -> None:
        folder, hf_config = self._writing / "epoch_0" / FOLDER, base_config(self._node.get("checkpoint_dir"))
        remove_tree(folder)  # copied along from a base that a run with adapters left
        if adapters and (has_own_names(model) or hf_config.get("model_type") in FAMILIES):
            write_adapter(folder, model, adapters, hf_config, str(Path(self._node.checkpoint_dir).resolve()))
        elif adapters:
            log.warning(f"no adapter in PEFT's format is saved: config.json's model_type is none of {', '.join(FAMILIES)}")

    def _started_from(self) -> set[Path]:
        """Return the folders that the config starts from, and the one resumed from: every save copies its small files."""
        nodes = [self._cfg.get("checkpointer"), self._cfg.get("teacher_checkpointer")]
        nodes += (self._cfg.get("teacher_checkpointers") or {}).values()
        paths = [(node or {}).get("checkpoint_dir") for node in nodes]
        return {Path(path).resolve() for path in (*paths, self._cfg.get("adapter_dir"), self._source) if path}

    def _full(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return whole CPU tensors on rank 0; every rank takes part in gathering them."""
        full = {}
        for name, tensor in show_weights(state.items(), "gathering weights", "tensor"):
            gathered = whole(tensor.detach(), self.run.device)
            if self.run.is_main:
                full[name] = gathered.cpu().contiguous()
        return full


def _lacks_file(folder: Path, error: BaseException) -> bool:
    """Return whether a checkpoint lacks config.json, weights that its index names, or a file that torchtune was asked for."""
    names = {"config.json"}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        names |= set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    holds_weights = any(path.suffix in WEIGHTS for path in folder.iterdir())
    absent = not holds_weights or any(not (folder / str(name)).is_file() for name in names)
    return absent or "No file with name" in str(error)
