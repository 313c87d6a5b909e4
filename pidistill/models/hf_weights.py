"""Load and save the weights of a folder under the names that transformers' modules have.

transformers itself reads and writes the files: some families store their weights in another layout than their modules have
(a mixture's experts one by one). Whatever the folder's code says, none of it is run.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pidistill.errors import InputError, one_line
from pidistill.models.hf_folder import SINGLE, stored_tensors, weight_files

State = dict[str, Tensor]
_SHARD = "5GB"  # of a folder that came in several files
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load(folder: Path) -> State:
    """Return the full state dict of the folder's model, on CPU, in the dtypes of its files; without a tied head.

    Raises:
        InputError: the folder lacks a weight, or has one that has no place or another shape.
    """
    from transformers import AutoModelForCausalLM

    from pidistill.models.hf_decoder import HFDecoder, quiet, read_config

    stored = {name: tensor.dtype for name, tensor in stored_tensors(folder, weight_files(folder)).items()}
    dtypes = set(stored.values())
    dtype = torch.float32 if "F32" in dtypes else torch.float16 if dtypes == {"F16"} else torch.bfloat16
    try:
        with quiet(), torch.device("cpu"):
            lm, info = AutoModelForCausalLM.from_pretrained(
                folder, config=read_config(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL
            )
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"transformers cannot load the weights in {folder} ({one_line(error, 300)}); copy or download the folder again"
        ) from error
    for key, what in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has no place for"),
        ("mismatched_keys", "has other shapes for"),
    ):
        if names := sorted(map(str, info.get(key) or ())):
            raise InputError(f"the checkpoint folder {folder} {what} {names[0]} ({len(names):,} in all); check checkpoint_dir")
    weights = HFDecoder(lm).state_dict()
    return _as_stored(weights, stored, lm) if len(dtypes) > 1 else weights


def _as_stored(weights: State, stored: dict[str, str], lm: Any) -> State:
    """Return weights, which transformers loads in one dtype, in those of the files: some have a router in fp32 beside bf16.

    A weight that is several tensors of different dtypes in the files keeps its dtype.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def dtype_of(name: str, weight: Tensor) -> torch.dtype:
        parts = [name] if name in stored else revert_weight_conversion(lm, {name: weight.to("meta")})
        found = {stored.get(part) for part in parts}
        return _DTYPES.get(found.pop(), weight.dtype) if len(found) == 1 else weight.dtype

    return {name: weight.to(dtype_of(name, weight)) for name, weight in weights.items()}


def save(weights: State, source: Path, folder: Path) -> None:
    """Write config.json and the weights into ``folder``, in the layout that the files in ``source`` have.

    Args:
        weights: as :func:`load` returns them, on CPU.
        source: the folder that the model came from.
    """
    from pidistill.models.hf_decoder import quiet

    sizes: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        sizes[tensor.dtype] += tensor.numel()
    lm = _empty_lm(source, sizes.most_common(1)[0][0])  # some models keep a router in fp32 beside bf16
    single = weight_files(source) == [SINGLE]
    with quiet():
        lm.save_pretrained(folder, state_dict=dict(weights), max_shard_size="1000GB" if single else _SHARD)
    (folder / "generation_config.json").unlink(missing_ok=True)  # the source's own one is copied


def to_stored(weights: State, source: Path) -> State:
    """Return the weights under the names that files have, for a reader of such files (vLLM)."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(_empty_lm(source, torch.float32), dict(weights)))


def _empty_lm(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from pidistill.models.hf_decoder import quiet, read_config

    with quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(read_config(folder), dtype=dtype, trust_remote_code=False)
