"""A checkpoint's model comes with the vocabulary that it was trained with."""

from pathlib import Path

import torch

from myllm import checkpoint
from myllm.checkpoint import TrainState
from myllm.config import ModelConfig, RunConfig, to_dict
from myllm.data.order import DataPosition
from myllm.data.tokenizer import load_tokenizer
from myllm.data.train_tokenizer import train_tokenizer
from myllm.loading import load_model
from myllm.model import Transformer


def put(folder: Path, vocab_size: int, tokenizer_file: Path | None) -> Path:
    config = RunConfig(model=ModelConfig(vocab_size, max_seq_len=16, d_model=16, n_layers=1, n_heads=2, d_ff=32))
    model = Transformer(config.model)
    random = [checkpoint.random_state(torch.device("cpu"))]
    state = TrainState(1, 1, DataPosition(0, 0, 0, ""))
    return checkpoint.save(folder, state, to_dict(config), model.state_dict(), {}, random, 0, tokenizer_file)


def test_the_vocabulary_that_ships_with_the_code(tmp_path: Path) -> None:
    _, tokenizer = load_model(put(tmp_path, 50_257, None), "cpu")
    assert tokenizer.is_default


def test_a_vocabulary_of_ones_own(tmp_path: Path) -> None:
    file = train_tokenizer(["the river ran under the bridge " * 9], 280, tmp_path / "mine.json", progress=False)
    expected = load_tokenizer(file).describe()
    folder = put(tmp_path / "checkpoints", expected["vocab_size"], file)
    file.unlink()
    model, tokenizer = load_model(folder, "cpu")
    assert tokenizer.describe() == expected
    assert model.config.vocab_size == tokenizer.vocab_size
    assert tokenizer.decode(tokenizer.encode("the bridge")) == "the bridge"
