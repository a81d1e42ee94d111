"""Int8 weights for generation and evaluation: a quarter of the memory.

Each matrix has one float32 scale per row (an output channel or a token) and integers from -128 to 127, so no weight
changes by more than half of 1 / 255 of its row's largest. Activations, norms, biases and learned positions stay floats.
torchao, an optional dependency, does the work. Without torch.compile it dequantizes a matrix for each product, which
saves memory but not time.

Shapes: B batch, T sequence, D d_model, V padded vocabulary.
"""

import logging
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn

from myllm.errors import UserError
from myllm.model.transformer import Transformer

TORCHAO_REQUIREMENT = "torchao==0.18.0"
"""As in pyproject.toml."""


class Int8Embedding(nn.Module):
    """An embedding with an int8 matrix. torchao's own would dequantize the whole vocabulary for each token."""

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
            '(or the extra "int8" of this package), or remove --int8'
        )


def quantize_int8(model: Transformer) -> None:
    """Quantize all matrices in place: linear layers, embedding and head. A tied head stays tied. For inference only.

    Raises:
        UserError: torchao is not installed.
    """
    check_torchao()
    model.set_compute_dtype(torch.float32)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # on import, torchao warns about CUDA kernels that int8 weights do not use
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    finally:
        logging.disable(disabled)
    # By default torchao changes settings of torch.compile for the whole process.
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda module, _: module is model.embedding or isinstance(module, nn.Linear))
    embedding = Int8Embedding(cast(nn.Parameter, model.embedding.weight))
    model.embedding = cast(nn.Embedding, embedding)
    model.quantized = True


def weight_bytes(model: nn.Module) -> int:
    """Memory of the parameters; shared parameters count once."""
    return sum(tensor.nbytes for parameter in model.parameters() for tensor in _stored_tensors(parameter))


def weight_dtype(model: Transformer) -> str:
    """`float32`, `bfloat16`, `float16` or `int8`."""
    dtype = model.compute_dtype or model.embedding.weight.dtype
    return "int8" if model.quantized else str(dtype).removeprefix("torch.")


def _stored_tensors(parameter: Tensor) -> list[Tensor]:
    """The tensors of a quantized matrix; other parameters themselves."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter]
    return [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
