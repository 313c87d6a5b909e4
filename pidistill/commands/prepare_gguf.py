"""`pidistill prepare gguf FILE --output FOLDER`: make a model folder in Hugging Face's format from a GGUF file.

transformers reads and dequantises the file, so its families and quantisations are those of transformers. The folder holds bf16
weights, config.json, the tokenizer and the chat template of the file. The weights are what the quantisation left of the model:
say "dequantised from <type>" beside every result.
"""

import argparse
import collections
import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from pidistill.commands.common import Parser, exit_on_input_error
from pidistill.errors import InputError, one_line

# The least cosine of an embedding and an output head that were one matrix before they were quantised in two ways.
_TIED_COSINE = 0.99


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="pidistill prepare gguf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("file", help="a GGUF file; of a split one, the first part joined with the others")
    made.add_argument("--output", required=True, help="the folder; one that holds a model is kept")
    return made


def main(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    with exit_on_input_error():
        print(convert(Path(arguments.file), Path(arguments.output)))
    sys.exit(0)


def convert(file: Path, output: Path) -> str:
    """Write the folder ``output``, and return the line that says what it holds."""
    _check(file, output)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the reader raises whatever a broken file leads it to
        raise InputError(f"transformers cannot read {file} ({one_line(error, 300)})") from error
    _check_whole(file, loaded, info["missing_keys"])
    model, tied = _clean(loaded)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    model.to(torch.bfloat16).save_pretrained(output)
    said = "; its output head was a second copy of the embedding and is tied to it" if tied else ""
    return (
        f"{output}: {type(model).__name__}, {model.num_parameters():,} weights in bf16, dequantised from {_types(file)}{said}"
    )


def _check(file: Path, output: Path) -> None:
    if not file.is_file():
        raise InputError(f"{file} is not a file")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"{file} is not a GGUF file: it does not begin with the letters GGUF")
    if (output / "config.json").exists():
        raise InputError(f"{output} holds a model already; choose another --output")
    blocked = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None)
    if blocked is not None:
        raise InputError(f"--output {output} cannot be made, because {blocked} is a file; choose another --output")
    absent = [name for name in ("transformers", "gguf") if importlib.util.find_spec(name) is None]
    if absent:
        raise InputError(f"reading a GGUF file needs {' and '.join(absent)}; run `pip install 'pidistill[gguf]'`")


def _check_whole(file: Path, loaded: Any, missing: Collection[str]) -> None:
    """Refuse a file that lacks weights, and one whose rotations transformers would read without their scaling."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise InputError(f"{file} is one of {parts.contents()} parts of a model; join them with `llama-gguf-split --merge`")
    absent = sorted(set(missing) - ({"lm_head.weight"} if loaded.config.tie_word_embeddings else set()))
    if absent:
        raise InputError(
            f"{file} lacks {len(absent):,} of the model's weights, the first of which is {absent[0]}; download it again"
        )
    scaling = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    for name, value in reader.fields.items():
        if name.endswith(".rope.scaling.type") and value.contents() != "none":
            scaling.append(f"{name} {value.contents()}")
    rotations = getattr(loaded.config.get_text_config(), "rope_parameters", None) or {}
    if scaling and rotations.get("rope_type", "default") == "default":
        raise InputError(
            f"{file} scales its rotations ({scaling[0]}), which transformers does not read from a GGUF file, so that the "
            "folder would hold another model; take the publisher's folder"
        )


def _clean(loaded: Any) -> tuple[Any, bool]:
    """Return the model as its publisher would save it, and whether its head was tied to the embedding here."""
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(loaded).__name__]
    tied = not config.tie_word_embeddings and _was_tied(loaded)
    config.tie_word_embeddings = config.tie_word_embeddings or tied
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), strict=False)
    model.tie_weights()
    return model, tied


def _was_tied(model: Any) -> bool:
    """Return whether the head is the embedding but for the rounding of two quantisations."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding.shape != head.shape:
        return False
    return torch.nn.functional.cosine_similarity(embedding.flatten(), head.flatten(), dim=0).item() > _TIED_COSINE


def _types(file: Path) -> str:
    """Return the types of the file's matrices, the commonest first."""
    from gguf import GGUFReader

    counts = collections.Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1)
    return ", ".join(name for name, _ in counts.most_common())
