"""Check the commands of a sweep as their recipes would."""

import copy
import functools
import importlib
from argparse import Namespace

from omegaconf import DictConfig, OmegaConf
from torchtune.config._utils import _merge_yaml_and_cli_args

from pidistill.commands.places import config_path, recipe_of
from pidistill.commands.sweep.cells import Cell, Sweep, stage_runs
from pidistill.config import check_config


def overrides_of(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words[words.index("--config") + 2 :])


load_once = functools.cache(OmegaConf.load)


def check_commands(sweep: Sweep, cell: Cell) -> None:
    """Do with each command what its recipe does first: merge the config with the words and check it."""
    for run in stage_runs(sweep, cell):
        words = [f"{key}={value}" for key, value in overrides_of(run.command).items()]
        module = importlib.import_module(f"recipes.{recipe_of(run.stage.config)}")
        config = _merge_yaml_and_cli_args(Namespace(**copy.deepcopy(load_once(config_path(run.stage.config)))), words)
        for key, node in list(config.items()):  # as a recipe's start() does
            if isinstance(node, DictConfig) and node.get("_component_", "") is None:
                config[key] = None
        check_config(config, module.KEYS, module.REQUIRED)
