"""The Transformer. Knows no ranks and no files."""

from .kv_cache import KVCache
from .transformer import Transformer

__all__ = ["KVCache", "Transformer"]
