"""Set how many examples Hypothesis draws, and import the large libraries before the package.

jaxtyping's import hook compiles all that is first imported while a module of the package is imported, other libraries too.
Libraries that are already there keep the bytecode of their installation, which halves the start of each test process.
"""

import os

import datasets  # noqa: F401
import optuna  # noqa: F401
import peft  # noqa: F401
import torchao.optim  # noqa: F401
import torchtune.training  # noqa: F401
import transformers  # noqa: F401
from hypothesis import settings

settings.register_profile("default run", max_examples=30)
settings.register_profile("thorough", max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default run"))
