"""Our figures under `--protocol lm-eval` are those of lm-evaluation-harness, example by example."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from model.test_parity import peer_of, random_model
from transformers import PreTrainedTokenizerFast

from myllm.config import ModelConfig
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.data.tokenizer.train import train_tokenizer
from myllm.distributed.collectives import DistContext
from myllm.evals.hellaswag import ending_log_probs, finish, hellaswag_sums, tokenize_examples
from myllm.evals.hellaswag_data import load_examples
from myllm.model.transformer import Transformer

OWN = Path(__file__).with_name("hellaswag_own.jsonl")
CPU = torch.device("cpu")
ALONE = DistContext(0, 0, 1, CPU)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [text for row in load_examples(OWN) for text in (row.ctx, *row.endings)]
    return load_tokenizer(
        train_tokenizer(texts, 600, tmp_path_factory.mktemp("own") / "tokenizer.json", progress=False)
    )


def exported(model: Transformer, tokenizer: Tokenizer, folder: Path) -> Path:
    """The model as transformers would open it."""
    peer_of(model).save_pretrained(folder)
    end = tokenizer.decode([tokenizer.end_of_text])
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.file), bos_token=end, eos_token=end, pad_token=end)
    reference.save_pretrained(folder)
    return folder


def by_the_harness(folder: Path, batch_size: int) -> dict[str, Any]:
    """What lm_eval's own task makes of our file."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Its own task to the letter, but for where the rows come from.
    task = {
        "include": str(files("lm_eval") / "tasks" / "hellaswag" / "hellaswag.yaml"),
        "task": "own_hellaswag",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(OWN)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own_hellaswag.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    harness = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size)
    return simple_evaluate(model=model, tasks=["own_hellaswag"], task_manager=harness, bootstrap_iters=1)


@pytest.mark.parametrize("window", [256, 64], ids=["fits", "some are cut"])
def test_parity(window: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=window, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48
    )
    model = random_model(config)
    reference = by_the_harness(exported(model, tokenizer, tmp_path), 4)
    tokenized = tokenize_examples(load_examples(OWN), tokenizer.encode, tokenizer.end_of_text, window, "lm-eval")
    assert any(len(item.contexts) > 1 for item in tokenized) == (window == 64)
    actual = {}
    for numbers, totals in ending_log_probs(model.score_continuations, tokenized, ALONE):
        actual |= dict(zip(numbers, totals, strict=True))
    samples = sorted(reference["samples"]["own_hellaswag"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(tokenized) == len(OWN.read_text(encoding="utf-8").splitlines()) >= 24
    for number, sample in enumerate(samples):
        assert sample["doc"]["ind"] == json.loads(OWN.read_text(encoding="utf-8").splitlines()[number])["ind"]
        expected = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert actual[number].tolist() == pytest.approx(expected, abs=5e-4)
        assert float(actual[number].argmax() == tokenized[number].answer) == sample["acc"]
        by_length = actual[number] / torch.tensor(tokenized[number].lengths)
        assert float(by_length.argmax() == tokenized[number].answer) == sample["acc_norm"]
    metrics = finish(hellaswag_sums(model.score_continuations, tokenized, ALONE))
    for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert metrics[name] == pytest.approx(reference["results"]["own_hellaswag"][f"{name},none"], abs=1e-12)
    assert 0 < metrics["acc"] < 1
