"""`show` decodes what lies in the shards: the same documents and sequences that other means find there."""

from pathlib import Path

import numpy as np
import pytest
import tiktoken

from myllm.config import DataConfig
from myllm.data.dataloader import read_batch
from myllm.data.dataset import Dataset
from myllm.data.inspect import describe_tokens, document_at, held_out_prompts, sequence_at
from myllm.data.order import StreamOrder
from myllm.data.prepare.prepare import prepare
from myllm.data.sampler import DataPosition, count_sequences, step_sequences, window_sequences
from myllm.errors import UserError

END = 50_256
pytestmark = pytest.mark.usefixtures("temp_data", "in_process")


@pytest.fixture(params=[300, 1_000, 10**9])
def dataset(request: pytest.FixtureRequest, mixed_corpus: Path, temp_data: Path) -> Dataset:
    return prepare(
        DataConfig(source=f"files:{mixed_corpus}", val_tokens=500, shard_tokens=request.param), progress=False
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_document_at_finds_every_document(dataset: Dataset, split: str) -> None:
    """Over the borders of shards, which cut documents in two."""
    tokens = np.concatenate([np.load(path) for path in sorted(dataset.folder.glob(f"{split}_*.npy"))])
    starts = np.flatnonzero(tokens == END)
    assert dataset.manifest["counts"][f"{split}_documents"] == len(starts)
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(tokens)], strict=True)):
        found_start, found = document_at(dataset, split, number)
        assert (found_start, found.tolist()) == (start, tokens[start:end].tolist())
    with pytest.raises(UserError, match=f"has {len(starts):,} {split} documents"):
        document_at(dataset, split, len(starts))


def test_prompts_are_the_first_words_of_held_out_documents(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"Das {number}. Blatt\n\n fiel leise zu Boden. " * 3)
    dataset = prepare(DataConfig(source=f"files:{tmp_path}"), progress=False)
    documents = [dataset.tokenizer().decode(document_at(dataset, "val", number)[1][1:]) for number in range(3)]
    prompts = held_out_prompts(dataset)
    assert prompts == held_out_prompts(dataset) == tuple(" ".join(text.split()[:5]) for text in documents)
    assert all(prompt.startswith("Das ") and prompt.endswith("Blatt fiel leise") for prompt in prompts)


def test_sequence_at_matches_training_reads(dataset: Dataset) -> None:
    total = count_sequences(dataset.train.tokens, 64)
    for number in (0, 1, total - 1):
        start, tokens = sequence_at(dataset, "train", number, 64, None)
        inputs, targets = read_batch(StreamOrder(dataset.train, 64), np.array([number]))
        assert start == 64 * number
        assert (tokens[:-1].tolist(), tokens[1:].tolist()) == (inputs[0].tolist(), targets[0].tolist())
    order = step_sequences(DataPosition(0, 0, 7, dataset.fingerprint), 10, total, window_sequences(64))
    assert [sequence_at(dataset, "train", i, 64, 7)[0] // 64 for i in range(10)] == order.tolist()
    # Beyond the first epoch, too.
    assert sequence_at(dataset, "train", total, 64, 7)[1].shape == (65,)
    with pytest.raises(UserError, match="numbered from 0"):
        sequence_at(dataset, "train", total, 64, None)


def test_describe_tokens_marks_document_boundaries(dataset: Dataset, reference: tiktoken.Encoding) -> None:
    start, tokens = document_at(dataset, "train", 1)
    around = dataset.train.read(start - 3, len(tokens) + 5)
    shown = describe_tokens(dataset, around)
    assert shown.startswith("--- continues a document that began earlier\n" + reference.decode(around[:3].tolist()))
    assert f"--- token 3: a document begins, {len(tokens) - 1:,} of its tokens are shown\n" in shown
    assert reference.decode(tokens[1:].tolist()) in shown
    assert describe_tokens(dataset, tokens).startswith("--- token 0: a document begins")
