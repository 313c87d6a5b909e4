"""Load and save model folders in Hugging Face's format: the index names the files, and config.json the family."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torchtune import training
from torchtune.training.checkpointing._utils import SUFFIXES_TO_NOT_COPY, copy_files, safe_torch_load

from pidistill.errors import InputError
from pidistill.models import hf_weights
from pidistill.models.config_json import check_sizes
from pidistill.models.hf_folder import INDEX, SINGLE, check_plain_name, read_json, stored_tensors, weight_files
from pidistill.models.hf_format import FAMILIES, family, from_hf, not_loaded, to_hf
from pidistill.models.progress import show_weights

# What torchtune calls the families, for configs that name one.
_TORCHTUNE_NAMES = {"LLAMA2": "llama", "LLAMA3": "llama", "LLAMA3_2": "llama", "QWEN2": "qwen2", "QWEN3": "qwen3"}


class HFCheckpointer:
    """Load and save a model folder, with the methods of torchtune's ``FullModelHFCheckpointer``.

    It needs no list of files and no model type, knows Qwen3, and writes the same files as it read: names, shards, and an index
    that lists what is there.

    Args:
        checkpoint_dir: folder with config.json and model.safetensors, or model.safetensors.index.json and the files it names.
        output_dir: where ``save_checkpoint`` writes ``epoch_N``.
        checkpoint_files: safetensors files to read in place of those that the folder's index names.
        model_type: llama, qwen2 or qwen3, or torchtune's name of it: checked against config.json's.
        own_names: the state dict has transformers' names, not torchtune's. The recipes set it to what `model` has; None takes
            torchtune's where there is a conversion.
    """

    def __init__(
        self,
        checkpoint_dir: str,
        output_dir: str,
        checkpoint_files: Sequence[str] | None = None,
        model_type: str | None = None,
        own_names: bool | None = None,
    ) -> None:
        self._folder, self._output_dir = Path(checkpoint_dir), Path(output_dir)
        self._config = read_json(self._folder / "config.json")
        self._own_names = self._config.get("model_type") not in FAMILIES if own_names is None else own_names
        found = self._config.get("model_type") if self._own_names else family(self._config)
        if not self._own_names:
            check_sizes(self._config, self._folder)
        if model_type is not None and _TORCHTUNE_NAMES.get(model_type, model_type) != found:
            raise InputError(
                f"checkpointer.model_type is {model_type} and {self._folder / 'config.json'} says {found}; remove model_type, "
                "or check checkpoint_dir"
            )
        if self._folder.resolve() in (self._output_dir.resolve(), *self._output_dir.resolve().parents):
            raise InputError(
                f"checkpointer.output_dir {self._output_dir} lies in checkpoint_dir {self._folder}, whose files it gets; "
                "set another output_dir"
            )
        for name in checkpoint_files or ():  # weights are saved under the same names
            check_plain_name(name, "checkpointer.checkpoint_files")
        self._files = list(checkpoint_files or weight_files(self._folder))
        if self._own_names and sorted(self._files) != weight_files(self._folder):
            raise InputError(
                f"checkpointer.checkpoint_files lists {', '.join(self._files)}, and transformers reads the files that "
                f"{self._folder} names ({', '.join(weight_files(self._folder))}); remove checkpointer.checkpoint_files"
            )
        self._file_of = {name: tensor.file for name, tensor in stored_tensors(self._folder, self._files).items()}
        self._output_dir.mkdir(parents=True, exist_ok=True)

    def load_checkpoint(self) -> dict[str, Any]:
        """Return ``{"model": full state dict}``, on CPU, in the dtype of the files."""
        if self._own_names:
            return {training.MODEL_KEY: hf_weights.load(self._folder)}
        weights: dict[str, Tensor] = {}
        for name in show_weights(self._files, "loading weights", "file"):
            weights |= safe_torch_load(self._folder / name)
        return {training.MODEL_KEY: from_hf(weights, self._config)}

    def save_checkpoint(
        self, state_dict: dict[str, Any], epoch: int, intermediate_checkpoint: bool = False, adapter_only: bool = False
    ) -> None:
        """Write ``output_dir/epoch_N``: the weights, their index, and the other files of ``checkpoint_dir``.

        ``state_dict`` is {"model": full state dict}, on CPU. Recipe state and adapters are not saved
        here: the recipes keep theirs in training_state.pt.
        """
        if adapter_only or intermediate_checkpoint or set(state_dict) - {training.MODEL_KEY}:
            raise InputError(
                "HFCheckpointer saves full models; for recipe state or adapter files in torchtune's own recipes, set "
                "checkpointer._component_ to torchtune.training.FullModelHFCheckpointer"
            )
        folder = self._output_dir / f"epoch_{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        if self._own_names:
            hf_weights.save(state_dict[training.MODEL_KEY], self._folder, folder)
            copy_files(self._folder, folder, ignore_suffixes=SUFFIXES_TO_NOT_COPY)
            return
        weights = to_hf(state_dict[training.MODEL_KEY], self._config)
        shards = self._shards(weights)
        for name, shard in show_weights(shards.items(), "saving weights", "file"):
            save_file(shard, folder / name, metadata={"format": "pt"})
        if list(shards) != [SINGLE]:
            index = {"metadata": {"total_size": sum(map(_bytes, weights.values()))}}
            index["weight_map"] = {key: name for name, shard in shards.items() for key in shard}
            (folder / INDEX).write_text(json.dumps(index, indent=2))
        self._write_config(folder, weights)
        copy_files(self._folder, folder, ignore_suffixes=SUFFIXES_TO_NOT_COPY)

    def _shards(self, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors by file, each in the file that it was read from."""
        if absent := sorted(self._file_of.keys() - weights.keys() - not_loaded(self._file_of, self._config)):
            raise InputError(
                f"the weights to save lack {absent[0]}, which {self._folder} has; set `model` to the builder that fits "
                "checkpointer.checkpoint_dir"
            )
        shards: dict[str, dict[str, Tensor]] = {name: {} for name in self._files}
        for key, tensor in weights.items():
            shards[self._file_of.get(key, self._files[-1])][key] = tensor.contiguous()
        return {name: shard for name, shard in shards.items() if shard}

    def _write_config(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write config.json with the dtype that the weights have now: transformers loads them in the one it names."""
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}
        key = "torch_dtype" if "torch_dtype" in self._config else "dtype"
        config = self._config | ({key: dtypes.pop()} if len(dtypes) == 1 else {})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
