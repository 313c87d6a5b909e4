"""Load libraries that only some environments need."""

import importlib
from types import ModuleType

from pidistill.errors import InputError


def load_extra(module: str, extra: str) -> ModuleType:
    """Import a library of the extra ``extra``, or say in one sentence how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"the library {module} is not usable here ({error}); install it with pip install 'pidistill[{extra}]'"
        ) from error
