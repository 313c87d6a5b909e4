"""`pidistill export`: make a folder to share from a run's checkpoint, with a model card written from the run.

pidistill export runs/tiny/pi_distill --output shared/tiny
pidistill export runs/tiny/pi_distill --checkpoint step_40 --output shared/tiny
pidistill export runs/tiny/pi_distill --output shared/tiny --push name/model

The folder has the weights, the tokenizer, the generation config and README.md; no training state. Tokenizer files are those of
the config's `tokenizer.path`, then those of the checkpoint, then those of `checkpointer.checkpoint_dir`. A template of
`tokenizer.chat_template` becomes chat_template.jinja; the other settings of `tokenizer` that change prompts stand in README.md.
`--push` uploads the folder with huggingface_hub.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import OmegaConf

from pidistill.commands.common import Parser, exit_on_input_error
from pidistill.commands.report.read import RunData, read_run
from pidistill.errors import InputError, escape_controls, one_line
from pidistill.jsonl import read_object

STATE = ("training_state.pt", "adapter")  # the adapter stands merged in the weights
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
             "merges.txt", "tokenizer.model", "generation_config.json", "added_tokens.json")  # fmt: skip
TOKENIZER_FOLDERS = ("tokenizer.path", "checkpointer.checkpoint_dir")
GENERATION, TEMPLATE, MORE_TEMPLATES = "generation_config.json", "chat_template.jinja", "additional_chat_templates"
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
    _check_tokenizer(run)
    template = _chosen_template(run, source)
    try:
        with _folder_aside(output) as aside:
            shutil.copytree(source.resolve(), aside, ignore=shutil.ignore_patterns(*STATE, aside.name), dirs_exist_ok=True)
            _add_tokenizer(run, aside)
            _set_stop_ids(run, aside)
            if template is not None:
                _set_template(aside, template)
            (aside / "README.md").write_text(card(run, source.resolve().name), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output} cannot be written ({_reason(error)}); name another folder with --output") from error
    return output


@contextlib.contextmanager
def _folder_aside(output: Path) -> Iterator[Path]:
    """Yield a folder whose files become those of ``output`` at the end; where that fails, nothing of it is left.

    It is made beside ``output``, and inside of one that exists, which may be a link, a mount or the only writable folder.
    """
    exists = output.is_dir()
    parent = output if exists else output.parent
    parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=parent))
    try:
        yield aside
        if exists:
            for path in list(aside.iterdir()):
                os.rename(path, output / path.name)
            aside.rmdir()
        else:
            os.rename(aside, output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _reason(error: OSError) -> str:
    """Return what the system said; a copied folder's error has a list of (from, to, error as a text) in place of it."""
    if not isinstance(error, shutil.Error):
        return error.strerror or one_line(error)
    reason = str(error.args[0][0][-1])
    found = re.match(r"\[Errno \d+\] ([^:]+)", reason)
    return found[1] if found else reason


def _add_tokenizer(run: RunData, output: Path) -> None:
    """Copy the tokenizer's files that the run was trained with; those of a whole `tokenizer.path` replace the checkpoint's."""
    own, initial = (_folder(run, key) for key in TOKENIZER_FOLDERS)
    is_whole = own is not None and (own / "tokenizer.json").is_file()
    if own is not None and is_whole:  # the checkpoint may have come with another chat template
        for name in TOKENIZER:
            if name != GENERATION:
                (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / MORE_TEMPLATES, ignore_errors=True)
        if (own / MORE_TEMPLATES).is_dir():
            shutil.copytree(own / MORE_TEMPLATES, output / MORE_TEMPLATES)
    for name in TOKENIZER:
        folders = (own,) if is_whole and name != GENERATION else (own, initial)
        found = next((folder / name for folder in folders if folder is not None and (folder / name).is_file()), None)
        if found is not None and not (output / name).exists():
            shutil.copy(found, output / name)


def _check_tokenizer(run: RunData) -> None:
    """Refuse a run whose tokenizer has a folder of its own that is not found from here."""
    own, initial = (_folder(run, key) for key in TOKENIZER_FOLDERS)
    if own is not None and own != initial and not own.exists():
        raise InputError(
            f"tokenizer.path={own} of the run is not found; put the folder back, or export from the folder that the run was "
            "started in"
        )


def _set_stop_ids(run: RunData, output: Path) -> None:
    """Let generation_config.json stop where the run's samples stopped.

    Those are the ids of `tokenizer.stop_tokens`, or of a `tokenizer.path` whose own generation_config.json names some.
    """
    own, initial = (_folder(run, key) for key in TOKENIZER_FOLDERS)
    named, path, ids = _setting(run, "tokenizer.stop_tokens"), output / "tokenizer.json", None
    if named and path.is_file():
        added = read_object(path, "copy the model's own").get("added_tokens") or []
        ids = [token["id"] for token in added if token.get("content") in list(named)]
    elif own is not None and own != initial and (own / GENERATION).is_file():
        ids = read_object(own / GENERATION, "copy the model's own").get("eos_token_id")
    if ids:
        path = output / GENERATION
        config = read_object(path, "copy the model's own") if path.is_file() else {}
        path.write_text(json.dumps(config | {"eos_token_id": ids}, indent=2), encoding="utf-8")


def _folder(run: RunData, key: str) -> Path | None:
    found = _setting(run, key)
    return Path(str(found)) if found else None


def _setting(run: RunData, name: str) -> Any:
    """Return a value of the run's config, its interpolations resolved; None where it has none."""
    config = OmegaConf.create()
    for key, value in run.config.items():
        OmegaConf.update(config, key, value)
    return OmegaConf.select(config, name, throw_on_resolution_failure=False)


def _chosen_template(run: RunData, source: Path) -> str | None:
    """Return the text of `tokenizer.chat_template`, a text, a file or a name of the model's; None where the run set none."""
    chosen = _setting(run, "tokenizer.chat_template")
    if chosen is None or not str(run.config.get("tokenizer._component_")).startswith("pidistill."):
        return None
    from pidistill.tokenizers.chat_template import find_templates  # here, since they import torch
    from pidistill.tokenizers.hf_files import read_json

    folders = (_folder(run, TOKENIZER_FOLDERS[0]), source, _folder(run, TOKENIZER_FOLDERS[1]))
    folder = next((folder for folder in folders if folder is not None and (folder / "tokenizer.json").is_file()), source)
    try:
        return find_templates(folder, read_json(folder / "tokenizer_config.json"), str(chosen))["default"]
    except InputError as error:
        raise InputError(
            f"the chat template that the run was trained with is not found ({error}); put its file back, or export from the "
            "folder that the run was started in"
        ) from error


def _set_template(output: Path, text: str) -> None:
    """Make ``text`` the only chat template of the folder.

    transformers prefers chat_template.jinja to the `chat_template` of tokenizer_config.json (older versions do not know it),
    and with tools the `tool_use` of the additional templates to both.
    """
    (output / TEMPLATE).write_text(text, encoding="utf-8")
    shutil.rmtree(output / MORE_TEMPLATES, ignore_errors=True)
    path = output / "tokenizer_config.json"
    config = read_object(path, "copy the model's own") if path.is_file() else {}
    if config.pop("chat_template", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def card(run: RunData, checkpoint: str) -> str:
    """Return the model card: what was trained, on what, with which privileged information, and what came of it."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    config = {key: _text(value) for key, value in run.config.items() if value is not None}
    groups = {name: {key.partition(".")[2]: value for key, value in config.items() if key.startswith(f"{name}.")}
              for name in ("objective", "privileged", "dataset", "optimizer", "teacher")}  # fmt: skip
    # Only what is known of these weights: the base and other checkpoints of the run have other numbers.
    exported = (run.folder / checkpoint).resolve()
    evaluations = {view: row for view, row in run.evaluations.items() if run.weights.get(view) == exported}
    found = re.fullmatch(r"step_(\d+)", checkpoint)
    steps = float(found[1]) if found else run.last("step")
    return environment.from_string(CARD.read_text(encoding="utf-8")).render(
        run=_text(run.name),
        checkpoint=checkpoint,
        config=config,
        groups=groups,
        method=groups["objective"].get("_component_", "supervised fine-tuning").rpartition(".")[2],
        evaluations={_text(view): _numbers(row) for view, row in evaluations.items()},
        unknown=[_text(view) for view in run.evaluations if view not in run.weights],
        during={name: f"{value:.3f}" for name in DURING if (value := run.last(name, steps)) is not None},
        steps=f"{steps:g}" if steps is not None else "unknown",
        prompt=_prompt_settings(run),
        alarms=[_text(text) for _, _, text in run.alarms],
        commit=_commit(run.folder),
        version=version("pidistill"),
    )


def _prompt_settings(run: RunData) -> dict[str, Any]:
    """Return what changed the run's prompts beside the tokenizer's files: table rows, the call, and variables as JSON."""
    values: Any = OmegaConf.to_container(OmegaConf.create(_setting(run, "tokenizer") or {}), resolve=False)
    variables = values.get("template_kwargs") or {}
    rows = {f"template_kwargs.{_text(key)}": _text(value) for key, value in variables.items()}
    if values.get("chat_template") is not None:
        rows["chat_template"] = f"in {TEMPLATE}"
    if values.get("tool_format") not in (None, "auto"):
        rows["tool_format"] = _text(values["tool_format"])
    if values.get("stop_tokens") is not None:
        rows["stop_tokens"] = _text(values["stop_tokens"])
    words = [f"{key}={value!r}" if key.isidentifier() else f"**{ {key: value}!r}" for key, value in variables.items()]
    call = ", ".join(["messages", "tokenize=False", "add_generation_prompt=True", *words])
    return {
        "rows": rows,
        "call": escape_controls(f"tokenizer.apply_chat_template({call})"),
        "variables": escape_controls(json.dumps(variables, default=str)) if variables else None,
        "plain_tools": values.get("tool_format") == "action",
    }


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
