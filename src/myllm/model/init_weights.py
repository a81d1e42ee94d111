"""Starting weights. One generator, parameters in a fixed order: the same seed gives the same weights on every rank."""

import math

import torch
from torch import nn

from myllm.config import ModelConfig

# Projections that write into the residual stream: their variance adds up over the layers, so it starts smaller.
RESIDUAL = ("out_proj.weight", "down_proj.weight")


def weight_std(name: str, config: ModelConfig) -> float:
    """Standard deviation of a matrix's starting weights, by its name.

    Source: "gpt2" is Radford et al. 2019, section 2.3 (residual projections over the square root of their number, two
    a layer); "reference" is LF_LLM-269M, whose embedding and linears follow Small Init (Nguyen and Salazar 2019) and
    whose residual projections follow Wang's init in GPT-NeoX, halved.
    """
    residual = name.endswith(RESIDUAL)
    if config.init == "gpt2":
        return 0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02
    if residual:
        return 1 / (math.sqrt(config.d_model) * config.n_layers)
    return math.sqrt(2 / (5 * config.d_model))


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter in place: matrices from a normal distribution, biases to 0, norm weights to 1.

    Rows of the vocabulary's padding are 0, and stay so: their gradient is always 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            # Drawn on the CPU, so that the numbers do not depend on the device.
            drawn = torch.empty(parameter.shape).normal_(0, weight_std(name, config), generator=generator)
            if parameter.shape[0] == config.padded_vocab_size and name in ("embedding.weight", "head.weight"):
                drawn[config.vocab_size :] = 0
            parameter.copy_(drawn)
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)
