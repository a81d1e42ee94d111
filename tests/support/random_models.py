"""Small models with random norms and biases, too: in a new model they are 1 and 0."""

import torch

from myllm.config import ModelConfig
from myllm.model.transformer import Transformer


def random_model(config: ModelConfig, scale: float) -> Transformer:
    """A model in evaluation mode with seeded noise of this scale added to all weights."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model
