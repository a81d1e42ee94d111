"""A mixture hands out what three data sets read by hand give, on any ranks; bad mixtures are refused with a way out."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from myllm.config import ModelConfig, RunConfig, TrainConfig
from myllm.data import sampler
from myllm.data.dataloader import BatchLoader
from myllm.data.dataset import Dataset
from myllm.data.mixture.interleaving import Interleaving
from myllm.data.mixture.mixed_dataset import COMPONENT_BITS, MixedDataset
from myllm.data.mixture.spec import parse_mixture
from myllm.data.sample_digest import LANES, SampleDigest
from myllm.data.sampler import DataPosition
from myllm.errors import UserError
from myllm.planning.batch import BatchPlan

MakeDataset = Callable[..., Dataset]
T = 8
SEQUENCES = 8
SIZES = (50, 31, 7)
TEXT = "A:0.5 B:0.3 C:0.2"


@pytest.fixture(scope="session")
def parts(make_dataset: MakeDataset) -> list[Dataset]:
    """Of 50, 31 and 7 sequences; a token says where it is from."""
    datasets = []
    for number, size in enumerate(SIZES):
        dataset = make_dataset(np.arange(size * T + 3) + 1_000 * number, np.arange(40), shard_tokens=90)
        dataset.manifest["fingerprint"] = str(number) * 64
        datasets.append(dataset)
    return datasets


@pytest.fixture
def mixed(parts: list[Dataset]) -> MixedDataset:
    return mix(TEXT, parts)


def mix(text: str, parts: list[Dataset]) -> MixedDataset:
    mixture = parse_mixture(text)
    assert mixture is not None
    return MixedDataset.of(mixture, parts)


def delivered(
    dataset: Dataset, first: int, steps: int, world_size: int = 1, micro: int = 2
) -> tuple[np.ndarray, list[int]]:
    """The sum of the hashes over all ranks, and the first token of each row, rank by rank."""
    plan = BatchPlan(SEQUENCES * T, T, micro, world_size)
    sums, rows = np.zeros(LANES, dtype=np.int64), []
    for rank in range(world_size):
        order = dataset.order(plan)
        start = DataPosition(0, 0, 3, dataset.fingerprint)
        for _ in range(first):
            start = order.advance(start, SEQUENCES)
        with BatchLoader(order, plan, start, rank, torch.device("cpu")) as loader:
            for _ in range(steps * plan.grad_accum_steps):
                rows += loader.next_batch()[0][:, 0].tolist()
            sums += loader.digest_sums
    return sums, rows


def by_hand(size: int, seed: int) -> Iterator[int]:
    """The sequences of a data set alone, epoch after epoch."""
    for epoch in itertools.count():
        yield from sampler.window_order(0, size, seed, epoch).tolist()


def test_components_keep_independent_order(mixed: MixedDataset) -> None:
    """Thirty steps: five epochs of the smallest."""
    _, rows = delivered(mixed, 0, 30)
    components = Interleaving(mixed.mixture.stages, SEQUENCES, 3).components(0, 30 * SEQUENCES)
    alone = [by_hand(size, 3) for size in SIZES]
    assert rows == [1_000 * component + T * next(alone[component]) for component in components.tolist()]
    assert 0.45 < (components == 0).mean() < 0.55


def test_samples_independent_of_ranks_and_restarts(mixed: MixedDataset) -> None:
    whole = SampleDigest().add(delivered(mixed, 0, 12)[0])
    for world_size, micro in ((1, 1), (2, 1), (2, 4), (4, 2), (8, 1)):
        assert SampleDigest().add(delivered(mixed, 0, 12, world_size, micro)[0]) == whole
    for stop in range(1, 12):
        first = SampleDigest().add(delivered(mixed, 0, stop, 2, 2)[0])
        assert first.add(delivered(mixed, stop, 12 - stop, 4, 1)[0]) == whole


def test_single_component_mixture_matches_dataset(parts: list[Dataset]) -> None:
    """To the digest, over the ends of epochs."""
    sums, rows = delivered(mix('[["A", 1]]', parts[:1]), 0, 15)
    expected, expected_rows = delivered(parts[0], 0, 15)
    assert rows == expected_rows
    assert (sums == expected).all()


def test_fingerprint_depends_on_components_and_weights(parts: list[Dataset]) -> None:
    texts = [TEXT, "A:0.5 B:0.2 C:0.3", TEXT + " @5 C:1", TEXT + " @6 C:1"]
    found = {mix(text, parts).fingerprint for text in texts} | {mix(TEXT, [parts[1], parts[0], parts[2]]).fingerprint}
    assert len(found) == 5
    assert mix("x:1/2 y:3/10 z:1/5", parts).fingerprint == mix(TEXT, parts).fingerprint, "names do not matter"


def test_sequence_number_encodes_component_and_index(mixed: MixedDataset) -> None:
    order = mixed.order(BatchPlan(SEQUENCES * T, T, 2, 1))
    sequences = np.array([3, (1 << COMPONENT_BITS) + 30, 2 << COMPONENT_BITS])
    order.verify(sequences)
    rows = order.read(sequences)
    assert rows.shape == (3, T + 1)
    assert rows[:, 0].tolist() == [24, 1_240, 2_000]


def test_different_vocabularies_and_duplicates_raise(parts: list[Dataset], make_dataset: MakeDataset) -> None:
    other = make_dataset(np.arange(100), np.arange(40))
    other.manifest["tokenizer"] = other.manifest["tokenizer"] | {"sha256": "0" * 64, "name": "mine", "vocab_size": 512}
    with pytest.raises(UserError, match=r"one vocabulary, but .* with r50k_base \(50,257 tokens\) and .* with mine"):
        mix("A:0.5 B:0.5", [parts[0], other])
    with pytest.raises(UserError, match="A and C are the same data set; give it one weight"):
        mix(TEXT, [parts[0], parts[1], parts[0]])


def config(steps: int, max_epochs: float = 4.0) -> RunConfig:
    train = TrainConfig(max_steps=steps, batch_tokens=SEQUENCES * T, max_epochs=max_epochs, seed=3)
    return RunConfig(model=ModelConfig(max_seq_len=T), train=train)


def test_exceeded_epochs_error_suggests_working_fixes(parts: list[Dataset], mixed: MixedDataset) -> None:
    mixed.check_epochs(config(15))
    with pytest.raises(UserError) as raised:
        mixed.check_epochs(config(40))
    message = str(raised.value)
    assert "40 steps of this mixture read dataset" in message
    assert "9.1 times, more than train.max_epochs 4" in message
    epochs = float(re.search(r"--train.max-epochs (\d+)", message)[1])
    mixed.check_epochs(config(40, epochs))
    steps = int(re.search(r"--train.max-steps (\d+)", message)[1])
    mixed.check_epochs(config(steps))
    with pytest.raises(UserError):
        mixed.check_epochs(config(steps + 1))
    text = re.search(r"re-weight: (.+)", message)[1]
    mix(text, parts).check_epochs(config(40))
    with pytest.raises(UserError, match="re-weight: not possible"):
        mixed.check_epochs(config(400))
    with pytest.raises(UserError, match="re-weight: over the whole run, at most"):
        mix("A:0.5 C:0.5 @20 B:1", [parts[0], parts[2], parts[1]]).check_epochs(config(100))


def test_component_shorter_than_sequence_raises(parts: list[Dataset], make_dataset: MakeDataset) -> None:
    short = make_dataset(np.arange(T), np.arange(40))
    short.manifest["fingerprint"] = "9" * 64
    with pytest.raises(UserError, match="8 training tokens, fewer than one sequence of 8"):
        mix("A:0.5 B:0.5", [parts[0], short]).check_epochs(config(1))


def test_length_and_progress_match_order(mixed: MixedDataset) -> None:
    _, rows = delivered(mixed, 0, 10)
    counts = [sum(row // 1_000 == number for row in rows) for number in range(3)]
    progress = list(mixed.progress(config(40), 10).values())
    assert [part["train_tokens"] for part in progress] == [count * T for count in counts]
    assert [part["epochs"] for part in progress] == [count / size for count, size in zip(counts, SIZES, strict=True)]
    first, *lines = mixed.describe_length(config(40))
    assert first == "2,560 tokens in 40 steps, a mixture:"
    assert len(lines) == 3


def test_train_stream_of_mixture_raises(mixed: MixedDataset) -> None:
    with pytest.raises(UserError, match="needs a single data set, not the mixture"):
        _ = mixed.train
    assert mixed.val is mixed.components[0].val
    assert replace(mixed).known_train_tokens == sum(size * T + 3 for size in SIZES)
