"""Fold parts without a counterpart in other formats into the weights beside them: a plain model computes the same.

| setting | becomes | difference |
|---|---|---|
| embedding_norm | each row of the embedding is normalized once; needs an untied head | 5e-7 |
| residual_scales | the output projections of a block are divided by the product of the scales up to it | 9e-7 |
| activation relu2 | gate_proj = up_proj, hidden_act relu: relu(h) h = relu(h)^2 (hub/weights.py) | 9e-7 |
| none of these | | 7e-7 |

The difference is that of transformers' logits in float32, relative to the largest: nothing but rounding.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from myllm.config import ModelConfig
from myllm.errors import UserError

from .source import ExportSource
from .verify import compare_logits, sample_inputs

SMALLEST_PRODUCT = 1e-3
"""Of residual scales. Dividing by less than this could overflow float16."""
RESIDUAL_PROJECTIONS = ("attention.out_proj", "feed_forward.down_proj")


def fold(source: ExportSource) -> ExportSource:
    """A source of a plain model with the same logits, as a comparison has shown; `source` if nothing is to be folded.

    Raises:
        UserError: a product of residual scales that nothing can be divided by, or other logits.
    """
    config, weights = fold_weights(source.config.model, source.weights)
    if config == source.config.model:
        return source
    folded = replace(source, config=replace(source.config, model=config), weights=weights)
    model = source.model()
    compare_logits("folded weights give", model, folded.model(), sample_inputs(model, source.tokenizer))
    return folded


def fold_weights(config: ModelConfig, weights: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A config without embedding_norm and residual_scales, and its weights in float32, computed in float64.

    Raises:
        UserError: a product of residual scales that nothing can be divided by.
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    if config.embedding_norm:
        _fold_embedding_norm(weights, config)
    if config.residual_scales:
        _fold_residual_scales(weights, config)
    plain = replace(config, embedding_norm=False, residual_scales=False)
    return plain, {name: weight.float() for name, weight in weights.items()}


def _fold_embedding_norm(weights: dict[str, Tensor], config: ModelConfig) -> None:
    table, weight = weights["embedding.weight"], weights.pop("embedding_norm.weight")
    if config.norm == "layernorm":
        bias = weights.pop("embedding_norm.bias", None)
        weights["embedding.weight"] = F.layer_norm(table, weight.shape, weight, bias, config.norm_eps)
    else:
        weights["embedding.weight"] = F.rms_norm(table, weight.shape, weight, config.norm_eps)


def _fold_residual_scales(weights: dict[str, Tensor], config: ModelConfig) -> None:
    products = weights.pop("residual_scales").cumprod(0)
    for layer, product in enumerate(products):
        if not SMALLEST_PRODUCT <= product < torch.inf:  # also rejects NaN
            raise UserError(
                f"the product of model.residual_scales up to block {layer} is {product:.2g}, expected at least "
                f"{SMALLEST_PRODUCT:g}: the projections cannot be divided by it. --to-onnx exports any model"
            )
        for name in RESIDUAL_PROJECTIONS:
            for part in ("weight", "bias") if config.bias else ("weight",):
                weights[f"blocks.{layer}.{name}.{part}"] /= product
