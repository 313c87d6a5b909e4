"""`pidistill export`: make a folder to share from a run's checkpoint, with a model card written from the run.

pidistill export runs/tiny/pi_distill --output shared/tiny
pidistill export runs/tiny/pi_distill --checkpoint step_40 --output shared/tiny
pidistill export runs/tiny/pi_distill --output shared/tiny --push name/model

The folder has the weights, the tokenizer, the generation config and README.md; no training state. Where the checkpoint lacks
tokenizer files, those of the config's `tokenizer.path` or `checkpointer.checkpoint_dir` are taken. `--push` uploads it with
huggingface_hub.
"""

import argparse
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import OmegaConf

from pidistill.commands.common import Parser, exit_on_input_error
from pidistill.commands.report.read import RunData, read_run
from pidistill.errors import InputError, escape_controls, one_line

STATE = ("training_state.pt", "adapter")  # the adapter stands merged in the weights
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
             "merges.txt", "tokenizer.model", "generation_config.json", "added_tokens.json")  # fmt: skip
TOKENIZER_FOLDERS = ("tokenizer.path", "checkpointer.checkpoint_dir")
CARD = Path(__file__).parent / "card.md.jinja"


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="pidistill export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    made.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    made.add_argument("--checkpoint", default="latest", metavar="NAME", help="a checkpoint of the run, such as step_40")
    made.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the hub under this name")
    return made


def main(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    with exit_on_input_error():
        print(export(arguments.run, arguments.output, arguments.checkpoint))
        if arguments.push:
            print(push(arguments.output, arguments.push))


def export(folder: Path, output: Path, checkpoint: str = "latest") -> Path:
    """Copy a checkpoint without its training state to ``output``, write the card, and return the folder."""
    run, source = read_run(folder, folder.name) if folder.is_dir() else RunData(folder.name, folder), folder / checkpoint
    if not (source / "config.json").is_file() or not list(source.glob("*.safetensors")):
        found = ", ".join(sorted(path.name for path in folder.glob("step_*"))) or "none"
        raise InputError(f"{source} holds no config.json with safetensors files (checkpoints there: {found}); name another one "
                         "with --checkpoint")  # fmt: skip
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not an empty folder; name another one with --output")
    try:
        shutil.copytree(source.resolve(), output, ignore=shutil.ignore_patterns(*STATE), dirs_exist_ok=True)
        _add_tokenizer(run, output)
        (output / "README.md").write_text(card(run, source.resolve().name), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}); name another folder with --output") from error
    return output


def _add_tokenizer(run: RunData, output: Path) -> None:
    """Copy the tokenizer's files that the checkpoint lacks, from the tokenizer's folder or from that of the initial weights."""
    config = OmegaConf.create()
    for key, value in run.config.items():
        OmegaConf.update(config, key, value)
    named = [OmegaConf.select(config, key, throw_on_resolution_failure=False) for key in TOKENIZER_FOLDERS]
    folders = [Path(str(folder)) for folder in named if folder]
    for name in TOKENIZER:
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is not None and not (output / name).exists():
            shutil.copy(found, output / name)


def card(run: RunData, checkpoint: str) -> str:
    """Return the model card: what was trained, on what, with which privileged information, and what came of it."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    config = {key: _text(value) for key, value in run.config.items() if value is not None}
    groups = {name: {key.partition(".")[2]: value for key, value in config.items() if key.startswith(f"{name}.")}
              for name in ("objective", "privileged", "dataset", "optimizer", "teacher")}  # fmt: skip
    # Only what is known of these weights: other checkpoints of the run have other numbers.
    evaluations = {view: row for view, row in run.evaluations.items() if run.checkpoints.get(view, checkpoint) == checkpoint}
    found = re.fullmatch(r"step_(\d+)", checkpoint)
    steps = float(found[1]) if found else run.last("step")
    return environment.from_string(CARD.read_text(encoding="utf-8")).render(
        run=_text(run.name),
        checkpoint=checkpoint,
        config=config,
        groups=groups,
        method=groups["objective"].get("_component_", "supervised fine-tuning").rpartition(".")[2],
        evaluations={_text(view): _numbers(row) for view, row in evaluations.items()},
        during={name: f"{value:.3f}" for name in DURING if (value := run.last(name, steps)) is not None},
        steps=f"{steps:g}" if steps is not None else "unknown",
        alarms=[_text(text) for _, _, text in run.alarms],
        commit=_commit(run.folder),
        version=version("pidistill"),
    )


DURING = ("eval_student_success_greedy", "eval_student_success", "eval_teacher_success", "eval_leak_frac")


def _numbers(row: dict[str, Any]) -> dict[str, str]:
    """Return the numbers of a view as text, with their intervals."""
    found = {}
    for key, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            interval = row.get(f"{key}_interval")
            found[_text(key)] = f"{value:.4g}" + (" [{:.3g}, {:.3g}]".format(*interval) if interval else "")
    return found


def _text(value: Any) -> str:
    """Return a value as one line that Markdown shows as it is."""
    text = escape_controls(value if isinstance(value, str) else json.dumps(value, default=str)).replace("\n", " ")
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#" else char for char in text)


def _commit(folder: Path) -> str | None:
    """Return the commit that a sweep recorded beside the run; None where none did."""
    try:
        return json.loads((folder / "sweep.json").read_text(encoding="utf-8")).get("commit")
    except (OSError, ValueError, AttributeError):
        return None


def push(folder: Path, name: str) -> str:
    """Upload the folder to the hub and return its address."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise InputError("--push needs the package huggingface_hub; run `pip install huggingface_hub`") from error
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # no network, no login, a name that is taken: each library version raises its own
        reason = one_line(error, 200)
        raise InputError(f"--push={name} failed ({reason}); log in with `huggingface-cli login`, and check the name") from error
    return f"https://huggingface.co/{name}"
