"""The `pidistill` command: torchtune's own command line with our recipes and configs registered, plus `plan`, `preview` ...

pidistill ls                                          our recipes and configs, then torchtune's
pidistill run pi_distill_distributed --config tiny/pi_distill max_steps=20
pidistill cp opsd_distributed my_recipe.py
pidistill plan tiny/opsd                              will it fit, where does its time go, what would make it fit
pidistill preview tiny/opsd                           both prompts as the model will see them, lengths, budget, leaks
pidistill prepare gsm8k --output train.parquet        GSM8K into verl's layout, with what the teacher sees
pidistill sweep tiny/opsd objective.beta=0.5,1 seed=0..2
pidistill demo                                        the comparison that `make demo` prints
"""

import importlib
import os
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torchtune._cli.tune import TuneCLIParser
from torchtune._recipe_registry import _ALL_RECIPES, Config, Recipe

from pidistill.commands.common import exit_on_input_error
from pidistill.commands.places import folders


def register() -> None:
    """Put our recipes and configs in front of torchtune's in the list that its command line reads.

    torchtune has no entry point for this. A config is registered with the recipe that its first comment names.
    """
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


# Our own commands: the module whose `main` gets the words behind the command.
COMMANDS = {
    "preview": "pidistill.commands.preview.command",
    "plan": "pidistill.commands.plan.command",
    "prepare": "pidistill.commands.prepare",
    "sweep": "pidistill.commands.sweep.command",
    "demo": "pidistill.commands.demo",
}


def main() -> None:
    register()
    command = next(iter(sys.argv[1:]), None)
    if command in COMMANDS:
        with exit_on_input_error():  # a library that an extra would install is missing
            module = importlib.import_module(COMMANDS[command])
        module.main(sys.argv[2:])
        return
    parser = TuneCLIParser()
    parser._parser.prog = "pidistill"
    parser._parser.description = "torchtune's command line, with the recipes and configs of pidistill in front"
    parser._parser.epilog = f"also: pidistill {', '.join(COMMANDS)}, each with --help"
    try:
        parser.run(parser.parse_args())
    except ChildFailedError as error:  # the recipe has said what is wrong; torchrun's own traceback would bury it
        sys.exit(error.get_first_failure()[1].exitcode or 1)
    except BrokenPipeError:  # `pidistill ls | head`; the interpreter would fail again on flushing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
