"""Load and save the weights of a folder under the names that transformers' modules have.

transformers itself reads and writes the files: some families store their weights in another layout than their modules have
(a mixture's experts one by one). Whatever the folder's code says, none of it is run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pidistill.errors import InputError
from pidistill.models.hf_folder import QUANTIZED, SINGLE, stored_tensors, weight_files

State = dict[str, Tensor]
_SHARD = "5GB"  # of a folder that came in several files
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load(folder: Path) -> State:
    """Return the full state dict of the folder's model, on CPU, in the widest dtype of its files; without a tied head.

    Raises:
        InputError: the folder lacks a weight, or has one that has no place or another shape.
    """
    from transformers import AutoModelForCausalLM

    from pidistill.models.hf_decoder import HFDecoder, quiet, read_config

    files = weight_files(folder)
    dtypes = {stored.dtype for stored in stored_tensors(folder, files).values()}
    dtype = torch.float32 if "F32" in dtypes else torch.float16 if dtypes == {"F16"} else torch.bfloat16
    try:
        with quiet(), torch.device("cpu"):
            lm, info = AutoModelForCausalLM.from_pretrained(
                folder, config=read_config(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL
            )
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"transformers cannot load the weights in {folder} ({' '.join(str(error).split())[:300]}); copy or download the "
            "folder again"
        ) from error
    for key, what in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has no place for"),
        ("mismatched_keys", "has other shapes for"),
    ):
        if names := sorted(map(str, info.get(key) or ())):
            raise InputError(f"the checkpoint folder {folder} {what} {names[0]} ({len(names):,} in all); check checkpoint_dir")
    return HFDecoder(lm).state_dict()


def save(weights: State, source: Path, folder: Path) -> None:
    """Write config.json and the weights into ``folder``, in the layout that the files in ``source`` have.

    Args:
        weights: as :func:`load` returns them, on CPU.
        source: the folder that the model came from.
    """
    from pidistill.models.hf_decoder import quiet

    dtypes = {tensor.dtype for tensor in weights.values()}
    lm = _empty_lm(source, dtypes.pop() if len(dtypes) == 1 else torch.float32)
    single = weight_files(source) == [SINGLE]
    with quiet():
        lm.save_pretrained(folder, state_dict=dict(weights), max_shard_size="1000GB" if single else _SHARD)
    (folder / "generation_config.json").unlink(missing_ok=True)  # the source's own one is copied


def to_stored(weights: State, source: Path) -> State:
    """Return the weights under the names that files have, for a reader of such files (vLLM)."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(_empty_lm(source, torch.float32), dict(weights)))


def stored_names_fit(model: Any, folder: Path, builder: str) -> None:
    """Refuse a folder of another model than ``model``, from the names and shapes of its files, where these are the modules'.

    A family whose files have another layout is compared when it is loaded.
    """
    stored = stored_tensors(folder, weight_files(folder))
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items() if "lora_" not in name and "magnitude" not in name}
    common = wanted.keys() & stored.keys()
    if len(common) < 0.9 * len(wanted):
        return
    if missing := sorted(wanted.keys() - common):
        raise InputError(
            f"checkpoint folder {folder} has no tensor {missing[0]}, which {builder} needs; the folder is incomplete, or of "
            "another model: check checkpoint_dir and `model`"
        )
    for name in sorted(common):
        if stored[name].dtype.startswith(QUANTIZED):
            raise InputError(
                f"the weights in {folder} are quantised ({name} is of type {stored[name].dtype}), and training needs them in "
                "bf16 or fp32; set checkpoint_dir to the unquantised model"
            )
        if stored[name].shape != wanted[name]:
            raise InputError(
                f"tensor {name} in {folder / stored[name].file} has shape {list(stored[name].shape)}, and {builder} needs "
                f"{list(wanted[name])}; check checkpoint_dir and `model`"
            )


def check_same_model(ours: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path, builder: str) -> None:
    """Refuse a folder whose config.json describes another model than the one that was built, which came from a folder too."""
    theirs = theirs["text_config"] if isinstance(theirs.get("text_config"), Mapping) else theirs  # of a folder with images too
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    other = [key for key in keys if key in ours and key in theirs and ours[key] != theirs[key]]
    if other:
        said, built = (", ".join(f"{key}={facts[key]}" for key in other) for facts in (theirs, ours))
        raise InputError(
            f"the checkpoint in {folder} is another model than {builder} builds: its config.json says {said}, and {builder} "
            f"has {built}; set model.path to ${{checkpointer.checkpoint_dir}}"
        )


def _empty_lm(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from pidistill.models.hf_decoder import quiet, read_config

    with quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(read_config(folder), dtype=dtype, trust_remote_code=False)
