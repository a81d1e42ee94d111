"""Checkpoints with weights of every kind, ready to be exported."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from model.test_parity import random_model

from myllm import checkpoint
from myllm.checkpoint import TrainState
from myllm.config import ModelConfig, RunConfig, to_dict
from myllm.data.order import DataPosition

Save = Callable[..., Path]
R50K = ModelConfig(max_seq_len=48, d_model=24, n_layers=2, n_heads=4, d_ff=40)
GPT2 = replace(R50K, position="learned", norm="layernorm", activation="gelu", bias=True)
KINDS = {
    "llama": replace(R50K, bias=True, n_kv_heads=2, head_dim=8),
    "qwen3": replace(R50K, qk_norm=True, tie_embeddings=False),
    "gpt2": GPT2,
}


@pytest.fixture
def save(temp_data: Path) -> Save:
    """Write a checkpoint of random weights as the run `made`; gives its folder."""

    def write(config: ModelConfig, tokenizer_file: Path | None = None, name: str = "made") -> Path:
        run = RunConfig(name=name, model=config)
        state = TrainState(7, 448, DataPosition(0, 0, 0, "somewhere"))
        weights = random_model(config).state_dict()
        return checkpoint.save(
            temp_data / "runs" / name / "checkpoints", state, to_dict(run), weights, {}, [], 0, tokenizer_file
        )

    return write
