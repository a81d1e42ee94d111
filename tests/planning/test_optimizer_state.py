"""The size of the optimizer's state, against a real optimizer and by hand."""

from dataclasses import replace

import pytest
import torch
from support.kinds import by_model_kind, by_optimizer

from myllm.config import ModelConfig, OptimConfig, RunConfig
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.planning.disk import SPARE_BYTES, checkpoint_bytes
from myllm.planning.optimizer_state import block_matrices, optimizer_state_bytes
from myllm.presets import PRESETS, get_preset


def parameters(name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(Transformer(get_preset(name).model).named_parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_block_matrices(name):
    matrices = [p.numel() for key, p in parameters(name).items() if key.startswith("blocks.") and p.ndim == 2]
    assert block_matrices(get_preset(name).model) == sum(matrices)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments(optimizer):
    """AdamW: two per parameter. Muon: one in 16 x (4 x 1,024 x 1,024 + 3 x 4,096 x 1,024) = 268,435,456 of them."""
    config = get_preset("lf-llm-269m-modern")
    config = replace(config, optim=replace(config.optim, optimizer=optimizer))
    stored = sum(p.numel() for p in parameters(config.name).values())
    moments = 2 * stored - (268_435_456 if optimizer == "muon" else 0)
    assert optimizer_state_bytes(config) == 4 * moments
    assert checkpoint_bytes(config) == 4 * (stored + moments) + SPARE_BYTES


@by_optimizer
@by_model_kind
def test_bytes_of_a_real_optimizer(optimizer, kind):
    shape = ModelConfig(vocab_size=100, max_seq_len=32, d_model=64, n_layers=3, n_heads=4, d_ff=96)
    config = RunConfig(model=replace(shape, **kind), optim=OptimConfig(optimizer=optimizer))
    model = Transformer(config.model)
    state = ScheduledOptimizer(model.named_parameters(), model.hidden_matrices(), config.optim, 10).zero_state()
    moments = [tensor for kinds in state.values() for name, tensor in kinds.items() if name != "step"]
    assert optimizer_state_bytes(config) == sum(tensor.nbytes for tensor in moments)
