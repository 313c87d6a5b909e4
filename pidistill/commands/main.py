"""Run the `pidistill` command: torchtune's own command line with our recipes and configs, plus commands of our own."""

import argparse
import importlib
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from pidistill.commands.common import exit_on_input_error, refuse
from pidistill.errors import InputError, one_line

# Our own commands: the module whose `main` gets the words behind the command, and what the help says.
COMMANDS = {
    "preview": ("pidistill.commands.preview.command", "Show both prompts as the model will see them, lengths, budget, leaks."),
    "plan": (
        "pidistill.commands.plan.command",
        "Estimate the memory and the time of a run, and say what would make it fit.",
    ),
    "validate": ("pidistill.commands.validate", "Check a config and its rows without a run."),
    "probe": (
        "pidistill.commands.probe.command",
        "Measure which wording of the privileged information helps the model, before training.",
    ),
    "keys": ("pidistill.commands.keys", "Print the config keys with type, default, recipes and meaning."),
    "prepare": (
        "pidistill.commands.prepare",
        "Write a dataset as a parquet file with its privileged information, or a GGUF file as a model folder.",
    ),
    "sweep": ("pidistill.commands.sweep.command", "Run a config over several values and seeds, and compare the results."),
    "report": (
        "pidistill.commands.report.command",
        "Write runs as one HTML page: curves, evaluations, configuration, rollouts token by token.",
    ),
    "watch": ("pidistill.commands.watch", "Show the numbers of a run while it is being written, or serve its report."),
    "export": ("pidistill.commands.export.command", "Make a folder to share of a run: weights, tokenizer, model card."),
    "demo": ("pidistill.commands.demo", "Compare methods on the tiny world."),
}
# torchtune's commands: listed here, so that the help need not import torch.
TORCHTUNES = {
    "ls": "List all recipes and configs.",
    "cp": "Copy a recipe or config to a local path; a file that exists is kept.",
    "run": "Run a recipe, with torchrun's arguments in front of its name.",
    "cat": "Print a config.",
    "download": "Download a model from the Hugging Face Hub or the Kaggle Model Hub.",
}


def main() -> None:
    """Run the command that the command line names."""
    words = sys.argv[1:]
    command = next(iter(words), "--help")
    if command in ("--help", "-h", "--version"):
        with exit_on_input_error():
            print(f"pidistill {version('pidistill')}" if command == "--version" else help_text(), flush=True)
        return
    if command in COMMANDS:
        with exit_on_input_error():  # a library that an extra would install is missing
            module = importlib.import_module(COMMANDS[command][0])
        try:
            module.main(words[1:])
        except KeyboardInterrupt:  # what the command started has ended by now
            sys.exit(130)
    elif command in TORCHTUNES:
        run_torchtune()
    else:
        refuse(f"command {command} is unknown; choose one of {', '.join([*TORCHTUNES, *COMMANDS])}")


def help_text() -> str:
    """Return the list of all commands."""
    lines = [f"  {name:<10}{text}" for name, text in {**TORCHTUNES, **{n: text for n, (_, text) in COMMANDS.items()}}.items()]
    return "\n".join(
        [
            "usage: pidistill [--help] [--version] COMMAND ...\n",
            "torchtune's command line with the recipes and configs of pidistill, and commands of our own\n",
            "commands (each with --help):",
            *lines,
        ]
    )


def register() -> None:
    """Put our recipes and configs in front of torchtune's in the list that its command line reads.

    torchtune has no entry point for this. A config is registered with the recipe that its first comment names.
    """
    from torchtune._recipe_registry import _ALL_RECIPES, Config, Recipe

    from pidistill.commands.places import folders

    recipes, configs = folders()
    ours = []
    for recipe in sorted(recipes.glob("*_distributed.py")):
        own = [
            path
            for path in sorted(configs.rglob("*.yaml"))
            if recipe.name in path.read_text(encoding="utf-8").split("\n", 1)[0]
        ]
        ours.append(
            Recipe(
                name=recipe.stem,
                file_path=str(recipe),  # absolute: torchtune joins it to its own folder, which an absolute path overrides
                configs=[Config(str(p.relative_to(configs).with_suffix("")), str(p)) for p in own],
                supports_distributed=True,
            )
        )
    _ALL_RECIPES[:0] = ours


def run_torchtune() -> None:
    """Run one of torchtune's commands; refuse wrong words, files and values with one sentence."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torchtune._cli.tune import TuneCLIParser

    from pidistill.distributed.launcher import print_refusals, refusal, stopped_by, wait_for_processes

    print_refusals()
    wait_for_processes()
    register()
    parser = TuneCLIParser()
    parser._parser.prog = "pidistill"
    _replace_errors(parser._parser)
    arguments = parser.parse_args()
    try:
        with exit_on_input_error():
            check_arguments(arguments)
            parser.run(arguments)
    except ChildFailedError as error:  # torchrun's own traceback would bury what the recipe said
        if sentence := refusal(error):
            print(sentence, file=sys.stderr, flush=True)
        sys.exit(error.get_first_failure()[1].exitcode or 1)
    except SignalException as error:
        print(stopped_by(error), file=sys.stderr, flush=True)
        sys.exit(getattr(error, "status", 128 + error.sigval))
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        # With torchrun's options the recipe runs in other processes, so that an error here is one of their launch.
        if "recipe_args" not in arguments or len(sys.argv) - 3 <= len(arguments.recipe_args):
            raise
        reason = one_line(error)
        refuse(f"the processes cannot be launched ({reason}); check the options in front of {arguments.recipe}")


def _replace_errors(parser: argparse.ArgumentParser) -> None:
    """Let a parser and its subparsers say an error in one sentence, without their usage."""

    def error(message: str) -> NoReturn:
        refuse(message.replace("`tune ", "`pidistill "))

    parser.error = error  # type: ignore[method-assign]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _replace_errors(inner)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what torchtune's `run`, `cp` and `cat` answer with a traceback, an unclear sentence or by overwriting a file."""
    if "recipe_args" in arguments:
        check_run_arguments(arguments.recipe, arguments.recipe_args)
    elif "make_parents" in arguments:
        check_copy_arguments(arguments.destination, arguments.make_parents)
    elif "config_name" in arguments:
        check_config_name(arguments.config_name)


def check_config_name(name: str) -> None:
    """Refuse a name that `cat` cannot print: no config's, no recipe's (it says so itself) and no YAML file's."""
    from torchtune._recipe_registry import get_all_recipes

    from pidistill.commands.places import suggestion

    recipes = get_all_recipes()
    configs = [config.name for recipe in recipes for config in recipe.configs]
    is_file = Path(name).suffix.lower() in (".yaml", ".yml") and Path(name).is_file()
    if not is_file and name not in configs and name not in [recipe.name for recipe in recipes]:
        advice = suggestion(name, configs) or "; name one of `pidistill ls` or a YAML file"
        raise InputError(f"config {name} is unknown{advice}")


def check_copy_arguments(destination: Path, make_parents: bool) -> None:
    """Refuse a destination that exists or cannot be made."""
    if destination.is_dir():
        raise InputError(f"{destination} is a folder; name the file to copy to")
    if any(path.exists() for path in (destination, *(destination.with_suffix(end) for end in (".py", ".yaml")))):
        raise InputError(f"{destination} exists and is kept; name another file, or move it away")
    if not destination.parent.is_dir() and not make_parents:
        raise InputError(f"the folder {destination.parent} does not exist; make it, or add --make-parents")
    if destination.parent.is_dir() and not os.access(destination.parent, os.W_OK):
        raise InputError(f"the folder {destination.parent} cannot be written to; name another one")


def check_run_arguments(recipe: str, words: list[str]) -> None:
    """Refuse an unknown recipe or config, a config that is not YAML, and overrides that it does not take."""
    from torchtune._recipe_registry import get_all_recipes

    from pidistill.commands.places import config_path, suggestion
    from pidistill.config import check_command_line

    known = {entry.name: entry for entry in get_all_recipes()}
    if recipe not in known and not _is_recipe_file(recipe):
        raise InputError(f"recipe {recipe} is neither a recipe of `pidistill ls` nor a Python file{suggestion(recipe, known)}")
    if "--config" not in words or words[-1] == "--config":
        raise InputError("a run needs --config and the name of a bundled config or a file")
    at = words.index("--config") + 1
    theirs = any(words[at] == entry.name for listed in known.values() for entry in listed.configs) and not is_ours(words[at])
    if not theirs:
        check_command_line([*words[:at], str(config_path(words[at])), *words[at + 1 :]])


def _is_recipe_file(recipe: str) -> bool:
    """Return True for `my_recipe.py` and `my_recipe`, both of which torchtune runs as a module."""
    return Path(f"{os.path.splitext(recipe)[0]}.py").is_file()


def is_ours(config: str) -> bool:
    """Return True for the name of a bundled config."""
    from pidistill.commands.places import folders

    return (folders()[1] / f"{config}.yaml").is_file()


if __name__ == "__main__":
    main()
