"""Save and exact resume. A checkpoint is a folder `output_dir/step_N`, complete or absent:

    the weights in their own format, as the configured torchtune checkpointer writes them (loads in transformers); of a
    model with LoRA adapters the merged ones (of 4-bit weights, those that the forward computes with),
    adapter/ with LoRA adapters: these alone in PEFT's format, for the base in transformers,
    the files that came with the initial checkpoint (config.json, tokenizer), and
    training_state.pt: optimizer, scheduler, adapters, teacher, step, round, random state of every rank, the objective's name.

`output_dir/latest` points to the newest. Checkpoints fall on round ends, so no half-used rollouts need saving.
"""

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torchtune import training, utils
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_state_dict

from pidistill.config import build
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.models.adapters import has_adapters, merged
from pidistill.models.nf4 import whole
from pidistill.models.peft_format import FOLDER, PERMUTES, base_config, with_adapter_dir
from pidistill.models.peft_format import write as write_adapter
from pidistill.teachers import Teacher
from pidistill.training.optimizers import optimizer_state, restore_optimizer
from pidistill.training.update import Updates, crossed

log = utils.get_logger("INFO")

STATE_FILE = "training_state.pt"

LATEST = "latest"

BEGAN = ".began"


def step_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"step_{step}"


class Checkpoints:
    """Loads the initial or the newest checkpoint of a run and saves new ones.

    Attributes:
        method: name of what is trained; a checkpoint of another method is refused on resume.
        must_match: settings that the data position depends on; a checkpoint with other values is refused on resume.
        state: the training state that was found on resume, else None.
    """

    def __init__(self, cfg: DictConfig, run: Run, method: str, must_match: Mapping[str, int] | None = None) -> None:
        self.run, self.method = run, method
        self.must_match = {"seed": run.seed, **(must_match or {})}
        self._cfg, self._node = cfg, cfg.checkpointer
        self._every = cfg.get("save_every_steps")
        self.state: dict[str, Any] | None = None
        folder = None
        if cfg.get("resume_from_checkpoint", False) and not self._killed_before_its_first():
            folder = self._newest()
        else:
            self._begin()
        self._checkpointer = self._open(folder)

    def _begin(self) -> None:
        link = self.run.output_dir / LATEST
        if Path(self._node.get("checkpoint_dir") or "").absolute() == link.absolute():
            raise InputError(
                f"checkpointer.checkpoint_dir={link} is the pointer that this run moves; name the step_N folder behind it, or "
                "set another output_dir"
            )
        if self.run.is_main:
            # A later resume must find neither an older run's checkpoint in this folder, nor nothing at all.
            link.unlink(missing_ok=True)
            (self.run.output_dir / BEGAN).touch()

    def _killed_before_its_first(self) -> bool:
        """True if a run began here and left no checkpoint: it starts over, and a job that always resumes needs no care."""
        over = (self.run.output_dir / BEGAN).exists() and not (self.run.output_dir / LATEST).exists()
        if over:
            log.warning(f"{self.run.output_dir} holds a run without a checkpoint; it starts again from its first step")
        return over

    def _newest(self) -> Path:
        link = self.run.output_dir / LATEST
        if not (link / STATE_FILE).is_file():
            raise InputError(
                f"resume_from_checkpoint=True but {link} holds no {STATE_FILE}; start without it, or check output_dir"
            )
        self.state = torch.load(link / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
        if self.state["method"] != self.method:
            raise InputError(
                f"the checkpoint in {link} was trained with {self.state['method']}, this config says {self.method}; "
                "set another output_dir, or the objective it was trained with"
            )
        for key, ours in self.must_match.items():
            theirs = self.state["must_match"].get(key)
            if theirs != ours:
                raise InputError(
                    f"the checkpoint in {link} was trained with {key}={theirs}, this run has {ours}; the order of the data "
                    "would differ: resume with the old value, or set another output_dir"
                )
        return link.resolve()

    def _open(self, folder: Path | None) -> Any:
        self._writing = self.run.output_dir / ".writing"
        # Read by the checkpointer at construction; only rank 0 writes into it.
        overrides: dict[str, Any] = {"output_dir": str(self._writing)}
        # With adapters the folder's weights are merged ones: the base's come from the initial checkpoint.
        if folder is not None and not self.state.get("adapters"):
            overrides |= {"checkpoint_dir": str(folder)}
            if self._node.get("checkpoint_files"):  # else the folder's own index names them
                overrides["checkpoint_files"] = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
        return build(self._node, **overrides)

    def load_weights(self) -> dict[str, Any]:
        """The full state dict that the run starts from, on CPU."""
        weights = self._checkpointer.load_checkpoint()[training.MODEL_KEY]
        self._base = _base_mark(weights)
        if self.state is None:
            return with_adapter_dir(self._cfg, self._cfg.model, weights)
        adapters = self.state.get("adapters") or {}
        if adapters and not torch.equal(self._base, self.state["base"]):
            raise InputError(
                f"checkpointer.checkpoint_dir={self._node.get('checkpoint_dir')} holds other weights than the adapters in "
                f"{self.run.output_dir / LATEST} were trained beside; set it to the run's first checkpoint"
            )
        return weights | adapters

    def restore(self, model: TransformerDecoder, updates: Updates, teacher: Teacher | None) -> dict[str, Any]:
        """Put optimizer, scheduler, teacher and random state back; returns {"step", "round"} (zeros for a fresh run)."""
        if self.state is None:
            return {"step": 0, "round": 0}
        wanted = has_adapters(model)
        if wanted != bool(self.state.get("adapters")):
            raise InputError(
                f"the checkpoint in {self.run.output_dir / LATEST} was trained {'without' if wanted else 'with'} LoRA "
                "adapters, unlike this config's; resume with the `model` that it was trained with, or set another output_dir"
            )
        self._refuse_other_state("lr_scheduler", updates.scheduler is not None, self.state["scheduler"] is not None)
        self._refuse_other_state("teacher", bool(teacher and teacher.state_dict()), bool(self.state["teacher"]))
        restore_optimizer(model, updates.optimizer, self.state["optimizer"])
        if updates.scheduler is not None:
            updates.scheduler.load_state_dict(self.state["scheduler"])
        updates.nonfinite_steps, updates.nonfinite_in_a_row, updates.empty_steps = self.state["skipped_steps"]
        if teacher is not None and self.state["teacher"]:
            teacher.load_state_dict(self.state["teacher"])
        if len(self.state["rng"]) == self.run.processes:
            _set_random_state(self.state["rng"][dist.get_rank()])
        else:
            log.warning(f"{len(self.state['rng'])} ranks wrote the checkpoint, this run has {self.run.processes}")
        return {"step": self.state["step"], "round": self.state["round"]}

    def _refuse_other_state(self, key: str, wanted: bool, found: bool) -> None:
        if wanted != found:
            link, ours = self.run.output_dir / LATEST, "needs it" if wanted else "has no use for it"
            raise InputError(
                f"the checkpoint in {link} {'has' if found else 'lacks'} a state of `{key}` and this config {ours}; resume "
                f"with the `{key}` that it was trained with, or set another output_dir"
            )

    def due(self, before: int, now: int) -> bool:
        """True if a multiple of save_every_steps lies in (before, now]: the first round end at or after it saves."""
        return crossed(self._every, before, now)

    def save(self, step: int, round_: int, model: TransformerDecoder, updates: Updates, teacher: Teacher | None) -> None:
        """Write `step_N` whole, then move it into place: a kill leaves the previous checkpoint as the newest."""
        weights = self._full(model.state_dict())
        optimizer = optimizer_state(model, updates.optimizer, self.run.is_main)
        teacher_state = self._full(teacher.state_dict()) if teacher is not None else {}
        rng: list[Any] = [None] * self.run.processes
        dist.all_gather_object(rng, _random_state())
        if self.run.is_main:
            adapters = get_adapter_state_dict(weights)
            shutil.rmtree(self._writing, ignore_errors=True)
            self._checkpointer.save_checkpoint({training.MODEL_KEY: merged(model, weights)}, epoch=0)
            self._write_adapter(model, adapters)
            state = {
                "method": self.method,
                "must_match": self.must_match,
                "step": step,
                "round": round_,
                "optimizer": optimizer,
                "adapters": adapters,  # a resumed run puts them beside the base's weights again
                "base": self._base if adapters else None,
                "scheduler": updates.scheduler.state_dict() if updates.scheduler is not None else None,
                "skipped_steps": (updates.nonfinite_steps, updates.nonfinite_in_a_row, updates.empty_steps),
                "teacher": teacher_state,
                "rng": rng,
            }
            (self._writing / "epoch_0" / STATE_FILE).unlink(missing_ok=True)  # copied along from a resumed folder
            torch.save(state, self._writing / "epoch_0" / STATE_FILE)
            self._publish(step)
        dist.barrier()

    def _write_adapter(self, model: nn.Module, adapters: dict[str, torch.Tensor]) -> None:
        folder, hf_config = self._writing / "epoch_0" / FOLDER, base_config(self._node.get("checkpoint_dir"))
        shutil.rmtree(folder, ignore_errors=True)  # copied along from a base that a run with adapters left
        if adapters and hf_config.get("model_type") in PERMUTES:
            write_adapter(folder, model, adapters, hf_config, str(Path(self._node.checkpoint_dir).resolve()))
        elif adapters:
            log.warning(f"no adapter in PEFT's format is saved: config.json's model_type is none of {', '.join(PERMUTES)}")

    def _publish(self, step: int) -> None:
        folder = step_folder(self.run.output_dir, step)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(self._writing / "epoch_0", folder)
        shutil.rmtree(self._writing, ignore_errors=True)
        link = self.run.output_dir / f".{LATEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        os.replace(link, self.run.output_dir / LATEST)

    def _full(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole CPU tensors on rank 0 (every rank takes part in gathering them)."""
        full = {}
        for name, tensor in state.items():
            gathered = whole(tensor.detach(), self.run.device)
            if self.run.is_main:
                full[name] = gathered.cpu().contiguous()
        return full


def _base_mark(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The first elements of each matrix as it was loaded, which tell one base from another."""
    return torch.cat([tensor[0, :4].float() for _, tensor in sorted(weights.items()) if tensor.ndim == 2])


def _random_state() -> dict[str, Any]:
    """Of torch, Python and numpy: the recipes draw from streams of their own, an environment or a reward may not."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
