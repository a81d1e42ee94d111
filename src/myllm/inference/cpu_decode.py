"""A model without nn.Module's machinery, for generation: where a step computes little, that is a third of its time.

nn.Module looks up each part and parameter in dictionaries of its own, in Python, and each call asks for hooks. A
stand-in has the same methods, from the same code, and plain attributes: parameters as they are, stand-ins for parts.
"""

from functools import cache
from typing import Any

from torch import nn

from myllm.model.attention import Attention
from myllm.model.feed_forward import FeedForward
from myllm.model.linear import Linear
from myllm.model.norm import RMSNorm
from myllm.model.transformer import Block, Transformer

SUPPORTED_TYPES = (
    Transformer,
    Block,
    Attention,
    FeedForward,
    RMSNorm,
    Linear,
    nn.Linear,
    nn.LayerNorm,
    nn.Embedding,
    nn.Identity,
)
"""Kinds of modules whose methods need nothing of nn.Module. Any other, such as a user's own, stays what it is."""
MODULE_INTERNALS = frozenset(vars(nn.Module()))


def as_plain_objects(module: nn.Module) -> Any:
    """What stands in for a module, with its weights; the module itself where it is of no known kind, or has hooks or a
    `forward` of its own.

    Changes of weights in place are seen. What is replaced afterwards is not: make one for each use.
    """
    if isinstance(module, nn.ModuleList):
        return [as_plain_objects(part) for part in module]
    if (
        type(module) not in SUPPORTED_TYPES
        or module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
    ):
        return module
    stand_in = _plain_class(type(module))()
    settings = {name: value for name, value in vars(module).items() if name not in MODULE_INTERNALS}
    parts = {name: None if part is None else as_plain_objects(part) for name, part in module._modules.items()}
    vars(stand_in).update(settings, training=module.training, **module._parameters, **module._buffers, **parts)
    return stand_in


@cache
def _plain_class(kind: type[nn.Module]) -> type:
    """A class of a module's own methods alone, called like it."""
    methods = {name: value for name, value in vars(kind).items() if not name.startswith("__")}
    return type(f"Bare{kind.__name__}", (), methods | {"__call__": kind.forward})
