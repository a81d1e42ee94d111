"""Initial weights: a seed gives every rank the same ones, because parameters are drawn in a fixed order."""

import math

import torch
from torch import nn

from myllm.config import ModelConfig

# Projections into the residual stream start smaller, because their variance adds up over the layers.
RESIDUAL_PROJECTIONS = ("out_proj.weight", "down_proj.weight")


def weight_std(name: str, config: ModelConfig) -> float:
    """Standard deviation of a matrix's initial weights.

    Source: "gpt2" is Radford et al. 2019, section 2.3 (residual projections are divided by the square root of their
    number, two a layer); "reference" is LF_LLM-269M, whose embedding and linears use Small Init (Nguyen and Salazar
    2019) and whose residual projections use Wang's init from GPT-NeoX, halved; "zero_residual" is nanochat's (2026),
    with a small head if it is untied.
    """
    residual = name.endswith(RESIDUAL_PROJECTIONS)
    if config.init == "gpt2":
        return 0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02
    if residual:
        return 0.0 if config.init == "zero_residual" else 1 / (math.sqrt(config.d_model) * config.n_layers)
    if config.init == "zero_residual" and name == "head.weight":
        return 0.001
    return math.sqrt(2 / (5 * config.d_model))


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter in place: matrices from a normal distribution, biases to 0, norm weights to 1.

    Padding rows of the vocabulary are 0 and stay 0: their gradient is always 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            # Drawn on the CPU, so that the weights do not depend on the device.
            weight = torch.empty(parameter.shape).normal_(0, weight_std(name, config), generator=generator)
            if parameter.shape[0] == config.padded_vocab_size and name in ("embedding.weight", "head.weight"):
                weight[config.vocab_size :] = 0
            parameter.copy_(weight)
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)
