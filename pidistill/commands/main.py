"""The `pidistill` command: torchtune's own command line with our recipes and configs registered, plus commands of our own.

pidistill ls                                          our recipes and configs, then torchtune's
pidistill run pi_distill_distributed --config tiny/pi_distill max_steps=20
pidistill cp opsd_distributed my_recipe.py
pidistill preview tiny/opsd                           both prompts as the model will see them, lengths, budget, leaks
pidistill plan tiny/opsd                              will it fit, where does its time go, what would make it fit
pidistill probe tiny/pi_distill                       which wording of the privileged information helps, before training
pidistill keys eval                                   the config keys whose row contains a word
pidistill prepare gsm8k --output train.parquet        GSM8K into verl's layout, with what the teacher sees
pidistill sweep tiny/opsd objective.beta=0.5,1 seed=0..2
pidistill demo                                        the comparison that `make demo` prints
"""

import argparse
import importlib
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

# Our own commands: the module whose `main` gets the words behind the command, and what the help says.
COMMANDS = {
    "preview": ("pidistill.commands.preview.command", "Show both prompts as the model will see them, lengths, budget, leaks."),
    "plan": (
        "pidistill.commands.plan.command",
        "Estimate the memory and the time of a run, and say what would make it fit.",
    ),
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
    "demo": ("pidistill.commands.demo", "Compare methods on the tiny world."),
}
# torchtune's commands, for a help that need not import torch.
TORCHTUNES = {
    "ls": "List all recipes and configs.",
    "cp": "Copy a recipe or config to a local path; a file that exists is kept.",
    "run": "Run a recipe, with torchrun's arguments in front of its name.",
    "cat": "Print a config.",
    "validate": "Check that a config is well-formed.",
    "download": "Download a model from the Hugging Face Hub or the Kaggle Model Hub.",
}


def main() -> None:
    words = sys.argv[1:]
    command = next(iter(words), "--help")
    if command in ("--help", "-h", "--version"):
        print(f"pidistill {version('pidistill')}" if command == "--version" else help_text())
        return
    logging.getLogger("torchao").addFilter(lambda record: "Skipping import of cpp extensions" not in record.getMessage())
    if command in COMMANDS:
        from pidistill.commands.common import exit_on_input_error

        with exit_on_input_error():  # a library that an extra would install is missing
            module = importlib.import_module(COMMANDS[command][0])
        module.main(words[1:])
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


def refuse(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)


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
    """Run one of torchtune's commands; wrong words, files and values are refused with one sentence."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torchtune._cli.tune import TuneCLIParser

    from pidistill.commands.common import exit_on_input_error

    register()
    parser = TuneCLIParser()
    parser._parser.prog = "pidistill"
    _replace_errors(parser._parser)
    arguments = parser.parse_args()
    try:
        with exit_on_input_error():
            check_arguments(arguments)
            parser.run(arguments)
    except ChildFailedError as error:  # the recipe has said what is wrong; torchrun's own traceback would bury it
        sys.exit(error.get_first_failure()[1].exitcode or 1)
    except BrokenPipeError:  # `pidistill ls | head`; the interpreter would fail again on flushing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _replace_errors(parser: argparse.ArgumentParser) -> None:
    """Let a parser and its subparsers say an error in one sentence, without their usage."""

    def error(message: str) -> NoReturn:
        refuse(" ".join(message.split()).replace("`tune ", "`pidistill "))

    parser.error = error  # type: ignore[method-assign]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _replace_errors(inner)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what torchtune's `run` and `cp` answer with a traceback or by overwriting a file."""
    if "recipe_args" in arguments:
        check_run_arguments(arguments.recipe, arguments.recipe_args)
    elif "no_clobber" in arguments:
        arguments.no_clobber = True


def check_run_arguments(recipe: str, words: list[str]) -> None:
    """Refuse an unknown recipe or config, a config that is not YAML, and overrides that it does not take."""
    from torchtune._recipe_registry import get_all_recipes

    from pidistill.commands.plan.reading import merged
    from pidistill.errors import InputError

    known = {entry.name: entry for entry in get_all_recipes()}
    if recipe not in known and not _is_recipe_file(recipe):
        raise InputError(f"recipe {recipe} is neither a recipe of `pidistill ls` nor a Python file")
    if "--config" not in words or words[-1] == "--config":
        raise InputError("a run needs --config and the name of a bundled config or a file")
    at = words.index("--config")
    config, rest = words[at + 1], words[:at] + words[at + 2 :]
    if not any(config == entry.name for listed in known.values() for entry in listed.configs) or _is_ours(config):
        merged(config, [word for word in rest if not word.startswith("-")])


def _is_recipe_file(recipe: str) -> bool:
    """Return True for `my_recipe.py`, `my_recipe` and `folder.my_recipe`, all of which torchtune runs."""
    path = Path(recipe)
    return path.is_file() or Path(f"{recipe.replace('.', '/')}.py").is_file()


def _is_ours(config: str) -> bool:
    from pidistill.commands.places import folders

    return (folders()[1] / f"{config}.yaml").is_file()


if __name__ == "__main__":
    main()
