"""A checkpoint's model comes with the vocabulary that it was trained with."""

from pathlib import Path

import pytest
import torch
from model.test_kv_cache import model_of
from support.saved_checkpoints import save_weights

from myllm.config import ModelConfig, RunConfig, TrainConfig
from myllm.data.tokenizer.load import load_tokenizer
from myllm.data.tokenizer.train import train_tokenizer
from myllm.errors import UserError
from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.int8 import weight_dtype
from myllm.inference.load import load_model
from myllm.inference.sampling_params import SamplingParams
from myllm.model.transformer import Transformer
from myllm.paths import check_model_path, may_be_model


def put(folder: Path, vocab_size: int, tokenizer_file: Path | None, precision: str = "auto") -> Path:
    model = ModelConfig(vocab_size, max_seq_len=16, d_model=16, n_layers=1, n_heads=2, d_ff=32)
    config = RunConfig(train=TrainConfig(precision=precision))
    return save_weights(folder, Transformer(model), config, tokenizer_file)


def test_default_tokenizer(tmp_path: Path) -> None:
    _, tokenizer = load_model(put(tmp_path, 50_257, None), "cpu")
    assert tokenizer.is_default


def test_best_of_a_run_without_one_is_not_a_repository(temp_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temp_data / "runs" / "lr-1" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr("myllm.inference.load.resolve_source", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(UserError, match=r"no checkpoint at 'lr-1/best'.*; runs with checkpoints: lr-1"):
        load_model("lr-1/best")
    assert not may_be_model("lr-1/best")
    with pytest.raises(UserError, match=r"lr-1/best is written by a run with train\.early_stop_patience"):
        check_model_path("lr-1/best")
    for repository in ("lr-2/best", "lr-1/my-model"):  # of an account with the name of a run
        assert may_be_model(repository)


def test_own_tokenizer(tmp_path: Path) -> None:
    file = train_tokenizer(["the river ran under the bridge " * 9], 280, tmp_path / "mine.json", progress=False)
    expected = load_tokenizer(file).describe()
    folder = put(tmp_path / "checkpoints", expected["vocab_size"], file)
    file.unlink()
    model, tokenizer = load_model(folder, "cpu")
    assert tokenizer.describe() == expected
    assert model.config.vocab_size == tokenizer.vocab_size
    assert tokenizer.decode(tokenizer.encode("the bridge")) == "the bridge"


@pytest.mark.parametrize("kind", [{}, {"tie_embeddings": False, "qk_norm": True, "n_kv_heads": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_dtype_matches_autocast(kind: dict, dtype: torch.dtype) -> None:
    """To the bit, whether the caller's autocast says so, as training's evaluations do, or the model."""
    model, generator = model_of(kind), torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (2, 9), generator=generator)

    def outputs() -> list[torch.Tensor]:
        rows = [Sequence([1, 2, 3], seed=0), Sequence([4], seed=1)]
        list(generate_batch(model, rows, 9, SamplingParams(1.0, 0)))
        owners, generated = torch.tensor([1, 0]), [torch.tensor(row.generated) for row in rows]
        return [*model.evaluate(tokens, tokens), *model.score_continuations(tokens, owners, tokens, tokens), *generated]

    exact = outputs()
    with torch.autocast("cpu", dtype):
        expected = outputs()
    model.set_compute_dtype(dtype)
    assert all(torch.equal(actual, reference) for actual, reference in zip(outputs(), expected, strict=True))
    assert not torch.equal(expected[0], exact[0])
    assert not torch.is_autocast_enabled("cpu")
    assert weight_dtype(model) == str(dtype).removeprefix("torch.")


def test_default_precision_matches_training(tmp_path: Path) -> None:
    folder = put(tmp_path, 50_257, None, precision="bfloat16")
    assert load_model(folder, "cpu").model.compute_dtype is torch.bfloat16
    assert load_model(folder, "cpu", precision="auto").model.compute_dtype is None
    assert load_model(folder, "cpu", precision="float32").model.compute_dtype is None
    assert load_model(put(tmp_path / "other", 50_257, None), "cpu").model.compute_dtype is None
    with pytest.raises(UserError, match="precision bfloat16 is for float weights"):
        load_model(folder, "cpu", int8=True, precision="bfloat16")
