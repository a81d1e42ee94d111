"""Checkpoints with weights of every kind, ready to be exported.

Most have a vocabulary of 400 tokens: building, writing and reading GPT-2's takes most of the time of an export.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from conftest import write_corpus

from myllm.checkpoint.format import Snapshot, write_checkpoint
from myllm.checkpoint.rng import get_rng_state
from myllm.checkpoint.state import TrainState
from myllm.config import ModelConfig, RunConfig, to_dict
from myllm.data.sampler import DataPosition
from myllm.data.tokenizer.train import train_tokenizer
from myllm.files import file_sha256
from myllm.model.transformer import Transformer

Save = Callable[..., Path]
R50K = ModelConfig(max_seq_len=48, d_model=24, n_layers=2, n_heads=4, d_ff=40)
SMALL = replace(R50K, vocab_size=400)
GPT2 = replace(SMALL, position="learned", norm="layernorm", activation="gelu", bias=True)
KINDS = {
    "llama": replace(SMALL, bias=True, n_kv_heads=2, head_dim=8),
    "qwen3": replace(SMALL, qk_norm=True, tie_embeddings=False),
    "gpt2": GPT2,
}


def rewrite(folder: Path, name: str, change: dict[str, Any]) -> None:
    """Other values in a JSON file of a checkpoint, with a manifest that says so."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def save_weights(
    checkpoints: Path, model: Transformer, config: RunConfig | None = None, tokenizer_file: Path | None = None
) -> Path:
    """Save a model as a checkpoint of step 1; returns its folder."""
    config = replace(config or RunConfig(), model=model.config)
    state, rng = TrainState(1, 1, DataPosition(0, 0, 0, "")), {0: get_rng_state(torch.device("cpu"))}
    snapshot = Snapshot(state, to_dict(config), model.state_dict(), {}, rng, tokenizer_file)
    return write_checkpoint(checkpoints, snapshot)


@cache
def small_vocabulary() -> str:
    """A tokenizer.json of 400 tokens."""
    with TemporaryDirectory() as folder:
        texts = (path.read_text(encoding="utf-8") for path in write_corpus(Path(folder) / "corpus").iterdir())
        return train_tokenizer(texts, 400, Path(folder) / "v.json", progress=False).read_text(encoding="utf-8")


@pytest.fixture
def save(temp_data: Path, tmp_path: Path) -> Save:
    """Write a checkpoint of random weights as the run `made`; gives its folder."""

    from model.test_parity import random_model  # here: it brings transformers, which few tests need

    def write(config: ModelConfig, tokenizer_file: Path | None = None, name: str = "made") -> Path:
        if config.vocab_size == 400 and tokenizer_file is None:
            tokenizer_file = tmp_path / "small.json"
            tokenizer_file.write_text(small_vocabulary(), encoding="utf-8")
        run = RunConfig(name=name, model=config)
        state = TrainState(7, 448, DataPosition(0, 0, 0, "somewhere"))
        snapshot = Snapshot(state, to_dict(run), random_model(config).state_dict(), {}, {}, tokenizer_file)
        return write_checkpoint(temp_data / "runs" / name / "checkpoints", snapshot)

    return write
