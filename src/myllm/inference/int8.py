"""Weights in eight bits: a quarter of the memory, for generation and evaluation.

Each matrix keeps one float32 scale a row (an output channel, or a word of the vocabulary) and whole numbers from -128
to 127: no weight moves by more than half of its row's step, 1 / 255 of the row's greatest. Activations, norms, biases
and learned positions stay floats. Done by torchao, which an extra brings.

Shapes: B batch, T sequence, D d_model, V padded vocabulary.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from myllm.errors import UserError
from myllm.model.transformer import Transformer

TORCHAO_REQUIREMENT = "torchao==0.18.0"
"""As in pyproject.toml's extra."""


class Int8Embedding(nn.Module):
    """An embedding of a quantised matrix. torchao's own would turn the whole vocabulary into floats for each token."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        """
        Shapes:
            tokens (B, T); returns (B, T, D)
        """
        return self.weight[tokens.flatten()].dequantize().view(*tokens.shape, -1)


def check_torchao() -> None:
    """
    Raises:
        UserError: torchao is not installed.
    """
    if find_spec("torchao") is None:
        raise UserError(
            f"int8 weights need torchao, which is not installed: python -m pip install {TORCHAO_REQUIREMENT} "
            '(or the extra "int8" of this package), or leave --int8 out'
        )


def quantize_int8(model: Transformer) -> None:
    """Replace every matrix by its int8 form, in place: linears, the embedding, and the head. For inference alone.

    A tied head stays tied: the embedding's one int8 matrix is both.

    Raises:
        UserError: torchao is not installed.
    """
    check_torchao()
    model.set_compute_dtype(torch.float32)
    with _quiet():
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # Without the switches of torch.compile that torchao would set for the whole process.
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    chosen = {id(model.embedding)} | {id(module) for module in model.modules() if isinstance(module, nn.Linear)}
    quantize_(model, config, filter_fn=lambda module, _: id(module) in chosen)
    model.embedding = Int8Embedding(model.embedding.weight)
    model.quantized = True


def weight_bytes(model: nn.Module) -> int:
    """What the parameters take in memory; a shared one counts once."""
    return sum(part.nbytes for parameter in model.parameters() for part in _stored(parameter))


def weight_dtype(model: Transformer) -> str:
    """`float32`, `int8`, or what `Transformer.set_compute_dtype` was given."""
    dtype = model.compute_dtype or model.embedding.weight.dtype
    return "int8" if model.quantized else str(dtype).removeprefix("torch.")


def _stored(parameter: Tensor) -> list[Tensor]:
    """A quantised matrix's parts; of any other, itself."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter]
    return [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]


@contextmanager
def _quiet() -> Iterator[None]:
    """Importing torchao warns about CUDA kernels of other kinds of quantisation that this torch cannot load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
