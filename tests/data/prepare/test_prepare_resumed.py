"""An interrupted preparation continues where it was: nothing twice, nothing lost, the same bytes."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from myllm.config import DataConfig
from myllm.data.dataset import Dataset
from myllm.data.prepare import prepare as preparing
from myllm.data.prepare import scheduler, shard_writer, work_items
from myllm.data.prepare.disk_space import check_disk
from myllm.data.prepare.multi_machine import prepare_worker_shard
from myllm.data.prepare.prepare import prepare
from myllm.data.prepare.spec import DatasetSpec, make_spec
from myllm.errors import UserError

Hashes = Callable[[Path], dict[str, str]]
pytestmark = pytest.mark.usefixtures("temp_data", "in_process")


def config(source: Path, **changes: object) -> DataConfig:
    return replace(DataConfig(source=f"files:{source}", val_tokens=500, workers=1), **changes)


def test_insufficient_disk_space_raises_before_start(
    mixed_corpus: Path, temp_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "start_workers", None)
    leave(monkeypatch, 1_000)
    for call in (
        lambda: prepare(config(mixed_corpus), progress=False),
        lambda: prepare_worker_shard(config(mixed_corpus), "1/2", progress=False),
    ):
        with pytest.raises(UserError, match=rf"needs about .* under {temp_data}.* of shards.* only 0\.0 MB are free"):
            call()


def leave(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, free_bytes))


def test_max_documents_limits_estimated_tokens(mixed_corpus: Path) -> None:
    everything = make_spec(config(mixed_corpus)).estimated_tokens
    assert make_spec(config(mixed_corpus, max_documents=3)).estimated_tokens == 30_000 < everything
    assert make_spec(config(mixed_corpus, max_documents=3, target_tokens=5_000)).estimated_tokens == 5_500


def test_existing_work_counts_towards_disk_space(mixed_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted preparation has used room that it need not find again."""
    data_config = config(mixed_corpus)
    recipe = make_spec(data_config)
    needed = int(re.search(r"needs about ([\d.]+) MB", check(recipe, monkeypatch, 10**12))[1].replace(".", "")) * 10**5
    with pytest.raises(UserError, match="free"):
        check(recipe, monkeypatch, needed // 2)
    (recipe.folder / "work").mkdir(parents=True)
    (recipe.folder / "work/000000.bin").write_bytes(b"x" * needed)
    assert "needs about" in check(recipe, monkeypatch, needed // 2)


def test_disk_space_of_folder_in_use(mixed_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker shard, whose lock is another one, deletes the folder of a finished download meanwhile."""
    recipe, real = make_spec(config(mixed_corpus)), os.scandir
    download = recipe.folder / "work/shard-1-of-2/downloads/a.part"
    download.mkdir(parents=True)

    def scandir(folder: str | Path) -> object:
        if Path(folder) == download:
            download.rmdir()
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "needs about" in check(recipe, monkeypatch, 10**12)
    assert not download.exists()


def check(recipe: DatasetSpec, monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> str:
    recipe.folder.parent.mkdir(parents=True, exist_ok=True)
    leave(monkeypatch, free_bytes)
    return check_disk(recipe, worker_count=1)


def test_disk_space_estimate_logged(mixed_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(config(mixed_corpus))
    assert re.search(r"preparing files-mixed-\w+: needs about .* MB of shards, .* free", capsys.readouterr().err)


MOMENTS = {
    "an item": ("myllm.data.prepare.work_items.np.savez", 1),
    "a shard": ("myllm.data.prepare.shard_writer.write_shard", 2),
    "the settings": ("myllm.data.prepare.work_dir.write_json", 0),
    "the list of shards": ("myllm.data.prepare.shard_writer.write_json", 1),
    "the spans": ("myllm.data.prepare.shard_writer.np.save", 0),
    "the manifest": ("myllm.data.prepare.shard_writer.write_json", -1),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_raises_and_preserves_work(
    moment: str, number: int, mixed_corpus: Path, monkeypatch: pytest.MonkeyPatch, hashes: Hashes
) -> None:
    name, after = MOMENTS[moment]
    monkeypatch.setattr(work_items, "SMALL_BYTES", 20_000)  # several items
    expected = hashes(prepare(config(mixed_corpus, shard_tokens=9_000), progress=False).folder)
    shutil.rmtree(make_spec(config(mixed_corpus, shard_tokens=9_000)).folder)
    module, _, function = name.rpartition(".")
    owner = import_module(module) if not module.endswith(".np") else np
    original, calls = getattr(owner, function), []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > after >= 0 or (after < 0 and args[0].name == "manifest.json"):
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fail)
        for _ in range(2):  # the second time it is no better
            with pytest.raises(
                UserError, match=r"no room to write the data set.*kept: free some space and run the same"
            ):
                prepare(config(mixed_corpus, shard_tokens=9_000), progress=False)
    assert len(calls) > max(after, 0)
    [folder] = (path for path in make_spec(config(mixed_corpus)).folder.parent.iterdir() if path.is_dir())
    assert not (folder / "manifest.json").exists()
    with pytest.raises(UserError, match="is incomplete"):
        Dataset.open(folder)
    dataset = prepare(config(mixed_corpus, shard_tokens=9_000), progress=False)
    assert hashes(dataset.folder) == expected


def interrupt(data_config: DataConfig, stop_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare up to this item."""
    add = shard_writer.ShardWriter.add

    def stop(self: shard_writer.ShardWriter, number: int, size_bytes: int) -> None:
        add(self, number, size_bytes)
        if number == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(data_config, progress=False)


def interrupted(
    source: Path, monkeypatch: pytest.MonkeyPatch, hashes: Hashes
) -> tuple[DataConfig, Path, dict[str, str]]:
    """A data set in the midst of its fourth item, its folder, and the hashes that it has when whole."""
    monkeypatch.setattr(work_items, "SMALL_BYTES", 1)
    data_config = config(source, shard_tokens=5_000)
    expected = hashes(prepare(data_config, progress=False).folder)
    folder = make_spec(data_config).folder
    shutil.rmtree(folder)
    interrupt(data_config, 3, monkeypatch)
    return data_config, folder, expected


def count_items(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The items that are tokenized from now on, by the name of their file."""
    done: list[str] = []
    original = scheduler.tokenize_item

    def tokenize(*args: Any) -> None:
        original(*args)
        done.append(args[4].name)

    monkeypatch.setattr(scheduler, "tokenize_item", tokenize)
    return done


@pytest.mark.parametrize("dedup", [False, True])
def test_resume_processes_only_unfinished_items(
    dedup: bool, mixed_corpus: Path, monkeypatch: pytest.MonkeyPatch, hashes: Hashes
) -> None:
    """Stopped after each item in turn: every item is tokenized once and every shard written once."""
    monkeypatch.setattr(work_items, "SMALL_BYTES", 1)  # an item a file
    data_config = config(mixed_corpus, shard_tokens=5_000, dedup_exact=dedup)
    done = count_items(monkeypatch)
    expected = hashes(prepare(data_config, progress=False).folder)
    assert done == [f"{number:06d}.bin" for number in range(5)]
    folder = make_spec(data_config).folder
    shutil.rmtree(folder)
    done.clear()
    shard_names: list[str] = []
    write = shard_writer.write_shard

    def record_write(path: Path, *args: Any) -> str:
        shard_names.append(path.name)
        return write(path, *args)

    monkeypatch.setattr(shard_writer, "write_shard", record_write)
    for stop_after in range(5):
        interrupt(data_config, stop_after, monkeypatch)
        assert not (folder / "manifest.json").exists()
    assert hashes(prepare(data_config, progress=False).folder) == expected
    assert sorted(done) == sorted(set(done))
    assert len(done) == 5
    assert sorted(shard_names) == sorted(name for name in expected if name.endswith(".npy") and name != "spans.npy")


def test_item_tokens_deleted_after_sharding(mixed_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_items, "SMALL_BYTES", 1)
    most = 0
    list_written = shard_writer.ShardWriter.list_written

    def look(self: shard_writer.ShardWriter, wait_for_all: bool = False) -> None:
        nonlocal most
        list_written(self, wait_for_all)
        most = max(most, len(list((self._folder / "work").glob("*.bin"))))

    monkeypatch.setattr(shard_writer.ShardWriter, "list_written", look)
    prepare(config(mixed_corpus, shard_tokens=500), progress=False)
    assert most <= 3, "items lie about that no shard needs"


@pytest.mark.parametrize(
    "loss",
    ["progress.json", "val_00000.npy", "train_00001.npy", "half a shard", "settings.json", "an item", "all items"],
)
def test_deleted_intermediate_files_rebuilt(
    loss: str, mixed_corpus: Path, monkeypatch: pytest.MonkeyPatch, hashes: Hashes
) -> None:
    data_config, folder, expected = interrupted(mixed_corpus, monkeypatch, hashes)
    left = sorted((folder / "work").glob("*.bin"))
    if loss == "half a shard":
        (folder / "train_00000.npy").write_bytes((folder / "train_00000.npy").read_bytes()[:3_000])
    elif "item" in loss:
        for path in left[: 1 if loss == "an item" else None]:
            path.unlink()
    else:
        (folder / loss).unlink()
    for _ in range(len(left) if "item" in loss else 0):
        with contextlib.suppress(UserError):  # says which is gone
            prepare(data_config, progress=False)
    assert hashes(prepare(data_config, progress=False).folder) == expected


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("kind", ["bin", "npz"])
@pytest.mark.parametrize(
    "damage", [flip, lambda c: b"", lambda c: c[: len(c) // 2], lambda c: bytes(len(c)), lambda c: c + b"ab"],
    ids=["a bit", "empty", "half", "zeros", "more"],
)  # fmt: skip
def test_damaged_items_rebuilt(
    damage: Callable[[bytes], bytes], kind: str, mixed_corpus: Path, monkeypatch: pytest.MonkeyPatch, hashes: Hashes
) -> None:
    data_config, folder, expected = interrupted(mixed_corpus, monkeypatch, hashes)
    index_files = sorted((folder / "work").glob("[0-9]*.npz"))
    assert len(list((folder / "work").glob("[0-9]*.bin"))) < len(index_files), "some are in shards already"
    for path in (folder / "work").glob(f"[0-9]*.{kind}"):
        path.write_bytes(damage(path.read_bytes()))
    assert hashes(prepare(data_config, progress=False).folder) == expected


def test_leftover_work_files_removed_after_kill(mixed_corpus: Path, hashes: Hashes) -> None:
    dataset = prepare(config(mixed_corpus), progress=False)
    expected = hashes(dataset.folder)
    (dataset.folder / "work/downloads").mkdir(parents=True)
    (dataset.folder / "work/000000.npz").touch()
    for name in ("progress.json", f".progress.json.{'0' * 16}.myllm.tmp"):
        (dataset.folder / name).write_text("{}")
    assert prepare(config(mixed_corpus), progress=False) == dataset
    assert hashes(dataset.folder) == expected
    assert not (dataset.folder / "work").exists()
