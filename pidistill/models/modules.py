"""Find the modules of a decoder that others change or measure."""

from torch import nn


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return every attention module, in the order of the layers: each can hold keys and values of earlier tokens."""
    return [module for module in model.modules() if hasattr(module, "kv_cache") and hasattr(module, "cache_enabled")]
