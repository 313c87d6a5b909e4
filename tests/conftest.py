"""Set how many examples Hypothesis draws, import large libraries before the package, and run the longest files first.

jaxtyping's import hook compiles whatever is first imported while a module of the package is imported, other libraries too.
Libraries that were imported before keep the bytecode of their installation, which saves each test process several seconds.
"""

import os
import signal

import datasets  # noqa: F401
import pytest
import torch.distributed as dist
import torchao.optim  # noqa: F401
import torchtune.training  # noqa: F401
import transformers  # noqa: F401
from hypothesis import HealthCheck, settings

# A shell without job control starts background jobs with interrupts ignored; the tests of interrupts, and the processes that
# they start, need the usual handler.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure: without a deadline per example, and however long the drawing of examples takes.
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default run", max_examples=30, **PATIENT)
settings.register_profile("thorough", max_examples=300, **PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default run"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the runs of whole recipes first: with several workers, short files at the end let all of them finish together."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/recipes/"))


@pytest.fixture(autouse=True, scope="module")
def end_the_process_group_of_runs():
    """End the group of one that a run in the test's own process has joined, so that the next module can have its own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
