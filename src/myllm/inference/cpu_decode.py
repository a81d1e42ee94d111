"""A stand-in for the model that decodes faster on a CPU, where a step computes little.

- Plain attributes: nn.Module finds parts and parameters in dictionaries, in Python, and looks for hooks at each call. A
  stand-in has the same methods, from the same code, but plain attributes. The debug model's step takes 15 % less time.
- Few rows: for x W^T, the matrix library repacks W first, which for a few rows of x is most of the work. (W x^T)^T
  computes the same without. A step with 4 rows takes 25 % less time.

The figures of both are in docs/experiments.md.
"""

from collections.abc import Hashable
from functools import cache
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from myllm.model.attention import Attention
from myllm.model.feed_forward import FeedForward
from myllm.model.norm import RMSNorm
from myllm.model.transformer import Block, Transformer

SUPPORTED_TYPES = (
    Transformer,
    Block,
    Attention,
    FeedForward,
    RMSNorm,
    nn.Linear,
    nn.LayerNorm,
    nn.Embedding,
    nn.Identity,
)
"""Modules whose methods use nothing of nn.Module. Any other, such as a user's own, stays in place."""
MODULE_INTERNALS = frozenset(vars(nn.Module()))
LARGE = 2**22
"""Elements of a linear's weight from which it does not fit in a CPU's cache. The head is always treated as large."""
FEW_ROWS, FEW_LOGIT_ROWS = 4, 8
"""Rows up to which (W x^T)^T is faster, in a large linear and in the head."""


def as_plain_objects(module: nn.Module) -> Any:
    """A stand-in for a module that shares its weights, or the module itself if it is of another type or has hooks or a
    `forward` of its own.

    In-place changes of weights are seen. Later replacements of parts are not: make a stand-in for each use.
    """
    if isinstance(module, nn.ModuleList):
        return [as_plain_objects(part) for part in module]
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    if type(module) not in SUPPORTED_TYPES or has_hooks or "forward" in vars(module):
        return module
    stand_in = _plain_class(cast(Hashable, type(module)))()
    settings = {name: value for name, value in vars(module).items() if name not in MODULE_INTERNALS}
    parts = {name: None if part is None else as_plain_objects(part) for name, part in module._modules.items()}
    vars(stand_in).update(settings, training=module.training, **module._parameters, **module._buffers, **parts)
    return stand_in


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None, few_rows: int) -> Tensor:
    """x W^T + b, as (W x^T)^T on a CPU if x has 2 to `few_rows` rows; the columns of the result are then contiguous.

    Shapes:
        x (..., D); weight (N, D); bias (N,); returns (..., N)
    """
    is_plain = type(weight) in (Tensor, nn.Parameter)  # a quantized weight supports F.linear only
    if not is_plain or x.device.type != "cpu" or not 1 < x.numel() // x.shape[-1] <= few_rows:
        return F.linear(x, weight, bias)
    y = (weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])  # (..., N)
    return y if bias is None else y.add_(bias)


def _linear(self: Any, x: Tensor) -> Tensor:
    return few_rows_linear(x, self.weight, self.bias, FEW_ROWS if self.weight.numel() >= LARGE else 1)


def _logits(self: Any, hidden: Tensor) -> Tensor:
    if self.quantized:
        return Transformer.logits(self, hidden)
    return few_rows_linear(hidden, self._head_weight[: self.config.vocab_size], None, FEW_LOGIT_ROWS)


OVERRIDES: dict[type[nn.Module], dict[str, Any]] = {nn.Linear: {"__call__": _linear}, Transformer: {"logits": _logits}}


@cache
def _plain_class(module_type: type[nn.Module]) -> type:
    """A class with only the methods of a module's own class, and those of OVERRIDES in their place."""
    methods = {name: value for name, value in vars(module_type).items() if not name.startswith("__")}
    methods |= {"__call__": module_type.forward} | OVERRIDES.get(module_type, {})
    return type(f"Plain{module_type.__name__}", (), methods)
