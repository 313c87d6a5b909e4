"""Distil privileged information into language models. This page is the map.

The folders, in the order of the data's way:

    data -> privileged -> tokenizers, chat -> envs, rewards -> rollouts -> scoring -> objectives, losses -> training

``models`` and ``distributed`` hold what runs on the devices, and ``commands`` holds the command line. To read a method, open
its recipe (``recipes/pi_distill_distributed.py``), its objective (``objectives/pi_distill.py``), then ``types.py``,
``data/builders.py``, ``privileged/prompt.py``, ``envs/base.py``, ``rewards/base.py``, ``rollouts/collect.py``,
``scoring/score.py``, ``scoring/head.py``, ``teachers.py`` and ``training/update.py``: twelve files.

A recipe also runs from Python: in any process, or in each of those that ``tune run`` or torchrun has started:

    from omegaconf import OmegaConf
    from pidistill.recipes.pi_distill_distributed import PiDistillRecipe

    config = OmegaConf.load("configs/tiny/pi_distill.yaml")
    recipe = PiDistillRecipe(config)
    recipe.setup(config)
    recipe.train()
    recipe.cleanup()
"""

import logging

# torchao says at each import that it does without its C++ extensions, which nothing here uses. The filter stands here because
# this module is imported before torchtune, which imports torchao.
logging.getLogger("torchao").addFilter(lambda record: "Skipping import of cpp extensions" not in record.getMessage())
