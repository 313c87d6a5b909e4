"""Find the modules of a decoder that others change or measure, and put others in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return every attention module, in the order of the layers: each can hold keys and values of earlier tokens."""
    return [module for module in model.modules() if hasattr(module, "kv_cache") and hasattr(module, "cache_enabled")]


@contextmanager
def replaced(owner: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Put ``module`` in the place of the module ``name`` of ``owner``, and the former back afterwards."""
    before = owner._modules[name]
    owner._modules[name] = module
    try:
        yield
    finally:
        owner._modules[name] = before
