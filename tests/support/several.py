"""Run several recipes one after another in one process group: starting two processes takes longer than they do.

    tune run --nproc_per_node 2 tests/support/several.py --config several.yaml

`runs` maps a name of tests.support.runs.RECIPES and a config file to each run: {first: [opsd, path.yaml], ...}.
"""

import sys

from omegaconf import DictConfig, OmegaConf
from torchtune import config

from pidistill.training.start import cleanup, one_sentence_errors
from tests.support.runs import quick_setup, run


@one_sentence_errors
@config.parse
def recipe_main(cfg: DictConfig) -> None:
    with quick_setup():
        for name, path in cfg.runs.values():
            run(name, OmegaConf.load(path))
    cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
