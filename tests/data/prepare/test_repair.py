"""`verify --repair` makes damaged shards again, only those, and to the byte; or says why it cannot."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from myllm.config import DataConfig
from myllm.data.dataset import Dataset
from myllm.data.prepare import repair as repairing
from myllm.data.prepare.prepare import prepare
from myllm.data.prepare.repair import repair
from myllm.errors import UserError

Hashes = Callable[[Path], dict[str, str]]
pytestmark = pytest.mark.usefixtures("temp_data", "in_process")


@pytest.fixture
def corpus(mixed_corpus: Path, tmp_path: Path) -> Path:
    return shutil.copytree(mixed_corpus, tmp_path / "corpus")


@pytest.fixture
def config(corpus: Path) -> DataConfig:
    return DataConfig(source=f"files:{corpus}", val_tokens=500, shard_tokens=2_000, dedup_exact=True, workers=1)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def identity(path: Path) -> tuple[int, int]:
    """What differs if a file is written again; reading it changes other times."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
def test_damaged_shard_rebuilt(damage: Callable[[Path], None], config: DataConfig, hashes: Hashes) -> None:
    folder = prepare(config, progress=False).folder
    before = hashes(folder)
    untouched = identity(folder / "train_00001.npy")
    for name in ("val_00000.npy", "train_00000.npy", "train_00003.npy"):
        damage(folder / name)
    dataset = Dataset.read(folder)
    assert dataset.damaged() == ["val_00000.npy", "train_00000.npy", "train_00003.npy"]
    repair(dataset, dataset.damaged(), progress=False)
    assert hashes(folder) == before
    assert Dataset.open(folder).damaged() == []
    assert identity(folder / "train_00001.npy") == untouched, "an intact shard was written again"


def test_repair_reads_only_affected_items(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        (tmp_path / "corpus" / f"own{number}.py").write_text(f"# {number}\n" + "word_" * 500_000)  # an item each
    dataset = prepare(replace(config, shard_tokens=300_000), progress=False)
    numbers: list[int] = []
    real = repairing.WorkScheduler

    def remember(*arguments: Any, **others: Any) -> object:
        job = real(*arguments, **others)
        numbers.extend(job.numbers)
        return job

    monkeypatch.setattr(repairing, "WorkScheduler", remember)
    last = dataset.shards[-1].file
    (dataset.folder / last).unlink()
    repair(Dataset.read(dataset.folder), [last], progress=False)
    assert len(numbers) <= 2, "no other than those that reach into it"
    assert Dataset.open(dataset.folder).damaged() == []


def test_repair_of_earlier_format_uses_spans(config: DataConfig) -> None:
    """It held out other documents, and its settings meant something else."""
    folder = prepare(config, progress=False).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    earlier = {"format": "myllm-shards-3", "val_tokens": 77, "fingerprint": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest | earlier))
    last = manifest["shards"][-1]["file"]
    (folder / last).unlink()
    repair(Dataset.read(folder), [last], progress=False)
    assert Dataset.open(folder).damaged() == []


def test_changed_source_prevents_repair(config: DataConfig, corpus: Path, hashes: Hashes) -> None:
    dataset = prepare(config, progress=False)
    flip_a_byte(dataset.folder / "train_00000.npy")
    before = hashes(dataset.folder)
    (corpus / "more.txt").write_text("more")
    with pytest.raises(UserError, match="source_sha256 differ from when it was prepared"):
        repair(Dataset.read(dataset.folder), ["train_00000.npy"], progress=False)
    shutil.rmtree(corpus)
    with pytest.raises(UserError, match="no text found"):
        repair(Dataset.read(dataset.folder), ["train_00000.npy"], progress=False)
    assert hashes(dataset.folder) == before


def test_repair_without_spans_raises(config: DataConfig) -> None:
    dataset = prepare(config, progress=False)
    (dataset.folder / "train_00000.npy").unlink()
    (dataset.folder / "spans.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot repair without .*spans\.npy"):
        repair(Dataset.read(dataset.folder), ["train_00000.npy"], progress=False)


def test_repair_rejects_mismatched_hash(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of a library might give."""
    dataset = prepare(config, progress=False)
    name = "train_00000.npy"
    flip_a_byte(dataset.folder / name)
    damaged = (dataset.folder / name).read_bytes()
    monkeypatch.setattr(repairing, "write_shard", lambda *_: "0" * 64)
    with pytest.raises(UserError, match="has sha256 000000000000"):
        repair(Dataset.read(dataset.folder), [name], progress=False)
    assert (dataset.folder / name).read_bytes() == damaged
    assert not (dataset.folder / ".repair").exists()


def test_repair_resolves_relative_source_path(
    corpus: Path, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = prepare(replace(config, source="files:corpus"), progress=False)
    monkeypatch.chdir("/")
    (dataset.folder / "train_00000.npy").unlink()
    repair(Dataset.read(dataset.folder), ["train_00000.npy"], progress=False)
    assert Dataset.open(dataset.folder).damaged() == []
