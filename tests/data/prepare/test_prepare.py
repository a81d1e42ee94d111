"""What a preparation writes: every document once, in the right split, in whole shards, named by what made it."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from myllm.config import DataConfig
from myllm.data.dataset import Dataset
from myllm.data.prepare import prepare as preparing
from myllm.data.prepare.prepare import prepare
from myllm.data.prepare.spec import make_spec
from myllm.errors import UserError

Hashes = Callable[[Path], dict[str, str]]
END = 50_256
pytestmark = pytest.mark.usefixtures("temp_data", "in_process")


def config(source: Path, **changes: object) -> DataConfig:
    return replace(DataConfig(source=f"files:{source}", val_tokens=500, workers=1), **changes)


def split_tokens(dataset: Dataset, split: str) -> np.ndarray:
    """All tokens of a split, read by NumPy alone."""
    parts = [np.load(path, mmap_mode="r") for path in sorted(dataset.folder.glob(f"{split}_*.npy"))]
    assert all(isinstance(part, np.memmap) and part.dtype == np.uint16 and part.ndim == 1 for part in parts)
    return np.concatenate(parts)


def texts_of(tokens: np.ndarray, reference: tiktoken.Encoding) -> list[str]:
    """A stream's documents: each begins with the end-of-text token."""
    starts = np.flatnonzero(tokens == END)
    assert starts[0] == 0
    return [reference.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


def source_texts(folder: Path) -> list[str]:
    lines = [line for path in sorted(folder.iterdir()) for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line)["text"] for line in lines]


def write(folder: Path, *texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def test_shards_contain_source_documents(mixed_corpus: Path, reference: tiktoken.Encoding) -> None:
    # Enough held out that some of it is in the corpus more than once.
    dataset = prepare(config(mixed_corpus, val_tokens=2_000, shard_tokens=1_000), progress=False)
    val = texts_of(split_tokens(dataset, "val"), reference)
    train = texts_of(split_tokens(dataset, "train"), reference)
    assert not set(val) & set(train)
    texts = [text for text in source_texts(mixed_corpus) if text.strip()]
    # A document that is in validation may be there more than once; its other copies are nowhere.
    expected = Counter({text: count for text, count in Counter(texts).items() if text not in set(val)})
    assert Counter(train) == expected
    assert not Counter(val) - Counter(texts)
    counts = dataset.manifest["counts"]
    assert counts == {
        "train_documents": len(train),
        "train_tokens": dataset.train.tokens,
        "val_documents": len(val),
        "val_tokens": dataset.val.tokens,
        "documents_split": 0,
        "copies_of_validation_dropped": len(texts) - len(train) - len(val),
        "duplicates_dropped": 0,
        "passed_over": {"empty": 2, "end_of_text_spelled_out": sum("<|endoftext|>" in text for text in texts)},
    }
    assert counts["copies_of_validation_dropped"] > 0, "the corpus tests nothing"


def test_streams_match_shard_files(mixed_corpus: Path) -> None:
    dataset = prepare(config(mixed_corpus, shard_tokens=777), progress=False)
    for split, stream in (("train", dataset.train), ("val", dataset.val)):
        assert (stream.read(0, stream.tokens) == split_tokens(dataset, split)).all()
    assert dataset.damaged() == []


@pytest.mark.parametrize("shard_tokens", [1, 100, 1_000, 10**9])
def test_all_shards_but_last_full(shard_tokens: int, tmp_path: Path) -> None:
    source = write(tmp_path / "s", *(f"document {i} " * 20 for i in range(8)))
    dataset = prepare(config(source, val_tokens=70, shard_tokens=shard_tokens), progress=False)
    for split in ("val", "train"):
        sizes = [shard.tokens for shard in dataset.shards if shard.split == split]
        assert all(size == shard_tokens for size in sizes[:-1])
        assert 0 < sizes[-1] <= shard_tokens
        assert [len(np.load(path)) for path in sorted(dataset.folder.glob(f"{split}_*.npy"))] == sizes


def test_validation_has_whole_documents_within_limit(mixed_corpus: Path) -> None:
    for val_tokens in (200, 900):
        dataset = prepare(config(mixed_corpus, val_tokens=val_tokens), progress=False)
        assert 0.5 * val_tokens < len(split_tokens(dataset, "val")) <= val_tokens
        assert dataset.manifest["counts"]["documents_split"] == 0


@pytest.mark.parametrize("more", [{}, {"__init__.py": ""}, {"empty.txt": "", "blank.txt": " \n"}])
def test_validation_limited_to_tenth_of_source(more: dict[str, str], tmp_path: Path) -> None:
    """Whatever empty files lie between."""
    source = write(tmp_path / "s", *(f"document number {i} says hello. " * 10 for i in range(50)))
    for name, text in more.items():
        (source / name).write_text(text)
    dataset = prepare(config(source, val_tokens=10**9), progress=False)
    counts = dataset.manifest["counts"]
    assert 5 <= 100 * counts["val_tokens"] / (counts["train_tokens"] + counts["val_tokens"]) <= 10


def test_validation_share_ignores_non_text_bytes(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    rows = [json.dumps({"text": f"line number {i}, and more", "other": "x" * 5_000}) for i in range(500)]
    (source / "a.jsonl").write_text("\n".join(rows))
    counts = prepare(config(source, val_tokens=10**6), progress=False).manifest["counts"]
    assert 5 <= 100 * counts["val_tokens"] / (counts["train_tokens"] + counts["val_tokens"]) <= 10


def test_single_document_split(tmp_path: Path, reference: tiktoken.Encoding) -> None:
    text = " ".join(f"number {i}" for i in range(1_000))
    dataset = prepare(config(write(tmp_path / "s", text), val_tokens=10**6), progress=False)
    [val], [train] = (texts_of(split_tokens(dataset, split), reference) for split in ("val", "train"))
    assert train + val == text
    assert 0.05 * len(text) < len(val) < 0.11 * len(text)
    assert [shard.documents for shard in dataset.shards] == [1, 1]


def test_target_tokens_truncates_training_exactly(mixed_corpus: Path) -> None:
    whole = prepare(config(mixed_corpus, val_tokens=300), progress=False)
    for target in (2_700, 3_000, 10**9):
        dataset = prepare(config(mixed_corpus, val_tokens=300, target_tokens=target), progress=False)
        tokens = split_tokens(dataset, "train")
        assert (split_tokens(dataset, "val") == split_tokens(whole, "val")).all()
        assert (tokens == split_tokens(whole, "train")[: len(tokens)]).all()
        assert len(tokens) == min(target, whole.train.tokens)


def test_too_small_sources_raise(tmp_path: Path) -> None:
    for texts in (["only one"], ["same", "same"], ["one", "two"], [" ", ""], ["text", "\n"]):
        source = write(tmp_path / "s", *texts)
        with pytest.raises(UserError, match=r"a tenth and needs two tokens; add text|no usable document; 2 x empty"):
            prepare(config(source), progress=False)
        shutil.rmtree(source)


def test_shuffle_seed_changes_order(mixed_corpus: Path, reference: tiktoken.Encoding) -> None:
    one, two = (prepare(config(mixed_corpus, shuffle_seed=seed), progress=False) for seed in (0, 1))
    assert one.folder != two.folder
    assert split_tokens(one, "train").tolist() != split_tokens(two, "train").tolist()


def test_manifest_contents(mixed_corpus: Path) -> None:
    dataset = prepare(config(mixed_corpus), progress=False)
    manifest = json.loads((dataset.folder / "manifest.json").read_text())
    assert manifest["dtype"] == "uint16"
    assert manifest["tokenizer"]["end_of_text"] == END
    assert manifest["source"] == "files-mixed"
    assert dataset.name.startswith("files-mixed-")
    assert manifest["fingerprint"] == dataset.fingerprint
    assert dataset.name.endswith(dataset.fingerprint[:12])
    assert sorted(path.name for path in dataset.folder.iterdir()) == sorted(
        ["manifest.json", "passed_over.jsonl", "settings.json", "spans.npy", *(shard.file for shard in dataset.shards)]
    )
    assert str(mixed_corpus) not in json.dumps(manifest), "where it was made is no part of what was made"
    for shard in dataset.shards:
        tokens = np.load(dataset.folder / shard.file)
        assert (shard.tokens, shard.documents) == (len(tokens), int((tokens == END).sum()))


def test_spans_cover_shards_in_order(mixed_corpus: Path) -> None:
    """Shard, item, start, end: end to end they are the shards, in order."""
    dataset = prepare(config(mixed_corpus, shard_tokens=1_000), progress=False)
    spans = np.load(dataset.folder / "spans.npy")
    assert spans.dtype == np.int64
    for number, shard in enumerate(dataset.shards):
        assert (spans[spans[:, 0] == number, 3] - spans[spans[:, 0] == number, 2]).sum() == shard.tokens
    assert (np.diff(spans[:, 0]) >= 0).all()


def test_repeated_prepare_reuses_dataset(mixed_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config(mixed_corpus), progress=False)
    monkeypatch.setattr(preparing, "_build", None)
    assert prepare(config(mixed_corpus, workers=7), progress=False) == first
    assert prepare(DataConfig(source="none", dataset=first.name), progress=False) == first


def test_dataset_from_concurrent_process_reused(mixed_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = prepare(config(mixed_corpus), progress=False)
    aside = dataset.folder.rename(dataset.folder.with_name("aside"))

    @contextmanager
    def locked_after_a_wait(*_: object) -> Iterator[None]:
        aside.rename(dataset.folder)
        yield

    monkeypatch.setattr(preparing, "preparation_lock", locked_after_a_wait)
    monkeypatch.setattr(preparing, "_build", None)
    assert prepare(config(mixed_corpus), progress=False) == dataset


def test_dataset_name_depends_on_content_settings(mixed_corpus: Path) -> None:
    changes = [{}, {"val_tokens": 501}, {"target_tokens": 9}, {"shard_tokens": 9}, {"shuffle_seed": 9}]
    assert len({make_spec(config(mixed_corpus, **change)).folder for change in changes}) == len(changes)
    assert make_spec(config(mixed_corpus, workers=9)).folder == make_spec(config(mixed_corpus)).folder


def test_file_in_place_of_data_folder_raises(mixed_corpus: Path, temp_data: Path) -> None:
    temp_data.write_text("")
    with pytest.raises(UserError, match="MYLLM_DATA"):
        prepare(config(mixed_corpus), progress=False)


def test_folder_without_manifest_rebuilt(mixed_corpus: Path, hashes: Hashes) -> None:
    dataset = prepare(config(mixed_corpus), progress=False)
    before = dataset.train.read(0, dataset.train.tokens).tolist()
    for name in ("manifest.json", "val_00000.npy"):  # as an `rm -r` that was interrupted leaves it
        (dataset.folder / name).unlink()
    (dataset.folder / "notes.txt").write_text("mine")
    assert prepare(config(mixed_corpus), progress=False).train.read(0, len(before)).tolist() == before
    assert (dataset.folder / "notes.txt").read_text() == "mine"


def test_damaged_dataset_raises(mixed_corpus: Path) -> None:
    dataset = prepare(config(mixed_corpus), progress=False)
    (dataset.folder / "train_00000.npy").unlink()
    with pytest.raises(UserError, match=f"delete {dataset.folder} and prepare it again"):
        prepare(config(mixed_corpus), progress=False)


def test_existing_dataset_of_same_source_noted(
    mixed_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who prepared all of a source is told so before a preset tokenizes a part of it again."""
    whole = prepare(config(mixed_corpus), progress=False)
    prepare(config(mixed_corpus, strip_control=True), progress=False)
    others = [f"text number {number} is another one" for number in range(40)]
    prepare(config(write(tmp_path / "other", *others)), progress=False)
    capsys.readouterr()
    prepare(config(mixed_corpus, target_tokens=300))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert notes == [
        f"note: {whole.name} has {whole.train.tokens:,} training tokens of the same source (target_tokens None instead "
        f"of 300); to train on it instead: --data.dataset {whole.name}"
    ]
