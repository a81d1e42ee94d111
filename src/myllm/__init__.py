"""MyLLM: pretrain a modern language model, from text to weights that other tools can read."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from myllm.inference.completion import generate
    from myllm.inference.load import load_model

__version__ = "0.1.0"
__all__ = ["generate", "load_model"]
LAZY = {"generate": "inference.completion", "load_model": "inference.load"}


def __getattr__(name: str) -> Any:
    """Import `generate` and `load_model` at their first use (PEP 562): importing torch takes seconds."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{LAZY[name]}", __name__), name)
