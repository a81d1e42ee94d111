"""Small models whose weights all matter: fresh ones have norms of 1, biases of 0, and say nearly nothing."""

import torch

from myllm.config import ModelConfig
from myllm.model.transformer import Transformer


def random_model(config: ModelConfig, scale: float) -> Transformer:
    """A model for evaluation, each of its weights moved by seeded noise of that size."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model
