"""A data set made in parts, on one machine or several: the bytes are those of one machine."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from myllm.config import DataConfig
from myllm.data.prepare import scheduler, work_items
from myllm.data.prepare.multi_machine import (
    items_of_shard,
    merge_worker_shards,
    parse_worker_shard,
    prepare_worker_shard,
)
from myllm.data.prepare.prepare import prepare
from myllm.data.prepare.spec import make_spec
from myllm.errors import UserError

if TYPE_CHECKING:
    from conftest import Preparations

Hashes = Callable[[Path], dict[str, str]]
SMALL_BYTES = 1
"""A file an item: five of them."""
SETTINGS: list[dict[str, Any]] = [
    {}, {"dedup_exact": True}, {"target_tokens": 9_000}, {"target_tokens": 500, "dedup_exact": True},
    {"max_documents": 150}, {"shuffle_files": False},
]  # fmt: skip


@pytest.fixture
def base_config(mixed_corpus: Path, temp_data: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(work_items, "SMALL_BYTES", SMALL_BYTES)
    return DataConfig(source=f"files:{mixed_corpus}", val_tokens=500, shard_tokens=5_000, workers=1)


def alone(config: DataConfig, hashes: Hashes) -> dict[str, str]:
    """What a single machine makes; nothing of it stays."""
    folder = prepare(config, progress=False).folder
    found = hashes(folder)
    shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bytes_independent_of_worker_shard_order(
    settings: dict[str, Any], base_config: DataConfig, hashes: Hashes
) -> None:
    config = replace(base_config, **settings)
    expected = alone(config, hashes)
    for order in list(itertools.permutations(["1/3", "2/3", "3/3"]))[::2]:
        folders = [prepare_worker_shard(config, part, progress=False) for part in order]
        assert all((folder / "done.json").is_file() for folder in folders)
        dataset = merge_worker_shards(make_spec(config).folder, progress=False)
        assert hashes(dataset.folder) == expected
        assert not (dataset.folder / "work").exists()
        shutil.rmtree(dataset.folder)


@pytest.mark.parametrize(("settings", "n_items"), [({}, 3), ({"max_documents": 10}, 2), ({"target_tokens": 100}, 2)])
def test_worker_shard_limited_to_its_share(settings: dict[str, int], n_items: int, base_config: DataConfig) -> None:
    folder = prepare_worker_shard(replace(base_config, **settings), "1/2", progress=False)
    assert len(list(folder.glob("*.npz"))) == n_items


def test_merge_shards_copied_from_machines(
    base_config: DataConfig, temp_data: Path, hashes: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(base_config, hashes)
    folder = make_spec(base_config).folder
    for number in (1, 2, 3):
        monkeypatch.setenv("MYLLM_DATA", str(temp_data.with_name(f"machine{number}")))
        shard_folder = prepare_worker_shard(base_config, f"{number}/3", progress=False)
        monkeypatch.setenv("MYLLM_DATA", str(temp_data))
        if number == 1:
            shutil.copytree(shard_folder.parents[1], folder)
        else:
            shutil.copytree(shard_folder, folder / "work" / shard_folder.name)
    assert hashes(merge_worker_shards(folder, progress=False).folder) == expected


def test_concurrent_worker_shards_survive_kill(
    mixed_corpus: Path, base_config: DataConfig, preparations: "Preparations", hashes: Hashes
) -> None:
    """They begin at the same moment, in the same folder, and one of them is killed on the way."""
    expected = alone(base_config, hashes)
    settings = {"val_tokens": 500, "shard_tokens": 5_000, "workers": 1, "small_bytes": SMALL_BYTES}
    for _ in range(2):
        started = [
            preparations.start(source=f"files:{mixed_corpus}", part=f"{number}/3", **settings) for number in (1, 2, 3)
        ]
        preparations.wait_for(lambda: preparations.seen("work/shard-1-of-3/*.bin"))
        started[0].kill()
        for process in started[1:]:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    prepare_worker_shard(base_config, "1/3", progress=False)
    assert hashes(merge_worker_shards(make_spec(base_config).folder, progress=False).folder) == expected


def test_interrupted_worker_shard_resumes(
    base_config: DataConfig, hashes: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(base_config, hashes)
    done: list[str] = []
    original = scheduler.tokenize_item

    def tokenize(*args: Any) -> None:
        if args[4].name in ("000001.bin", "000003.bin") and args[4].name not in tried:
            tried.add(args[4].name)
            raise KeyboardInterrupt
        original(*args)
        done.append(args[4].name)

    tried: set[str] = set()
    monkeypatch.setattr(scheduler, "tokenize_item", tokenize)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare_worker_shard(base_config, "1/1", progress=False)
    prepare_worker_shard(base_config, "1/1", progress=False)
    assert prepare_worker_shard(base_config, "1/1", progress=False).name == "shard-1-of-1"
    assert sorted(done) == [f"{number:06d}.bin" for number in range(5)], "an item was made twice"
    assert hashes(merge_worker_shards(make_spec(base_config).folder, progress=False).folder) == expected
    assert len(done) == 5, "items of the finished shard were tokenized again"


def test_interrupted_merge_resumes(base_config: DataConfig, hashes: Hashes) -> None:
    """Also where it was taking over the parts: an item's tokens were moved, its index was not."""
    expected = alone(base_config, hashes)
    for part in ("1/2", "2/2"):
        shard_folder = prepare_worker_shard(base_config, part, progress=False)
    first = min(shard_folder.glob("*.bin"))
    first.rename(shard_folder.parent / first.name)
    assert hashes(merge_worker_shards(make_spec(base_config).folder, progress=False).folder) == expected


def test_missing_worker_shards_raise(base_config: DataConfig) -> None:
    folder = make_spec(base_config).folder
    with pytest.raises(UserError, match="has no worker shards to merge"):
        merge_worker_shards(folder, progress=False)
    prepare_worker_shard(base_config, "2/4", progress=False)
    unfinished = prepare_worker_shard(base_config, "3/4", progress=False)
    (unfinished / "done.json").unlink()
    with pytest.raises(UserError, match="lacks shard-1-of-4, shard-3-of-4, shard-4-of-4: prepare those first"):
        merge_worker_shards(folder, progress=False)
    prepare_worker_shard(base_config, "1/2", progress=False)
    with pytest.raises(UserError, match="lacks shard-2-of-2: "):  # one way to cut is as good as another, but whole
        merge_worker_shards(folder, progress=False)


def test_more_worker_shards_than_files(base_config: DataConfig, hashes: Hashes) -> None:
    expected = alone(base_config, hashes)
    for number in range(1, 9):
        prepare_worker_shard(base_config, f"{number}/8", progress=False)
    assert hashes(merge_worker_shards(make_spec(base_config).folder, progress=False).folder) == expected


def test_merge_rejects_shard_with_other_settings(base_config: DataConfig) -> None:
    """Its folder has the same name, but its tokens are other ones."""
    other = prepare_worker_shard(replace(base_config, strip_control=True), "2/2", progress=False)
    shard_folder = prepare_worker_shard(base_config, "1/2", progress=False)
    shutil.copytree(other, shard_folder.with_name(other.name))
    with pytest.raises(
        UserError, match=r"shard-2-of-2 does not belong to files-mixed-\w+: it was prepared with other settings"
    ):
        merge_worker_shards(shard_folder.parents[1], progress=False)
    (shard_folder.with_name(other.name) / "done.json").write_text("")
    with pytest.raises(UserError, match="does not belong to"):
        merge_worker_shards(shard_folder.parents[1], progress=False)


def test_merge_rejects_changed_source(base_config: DataConfig, tmp_path: Path) -> None:
    source = shutil.copytree(base_config.source.partition(":")[2], tmp_path / "copy")
    shard_folder = prepare_worker_shard(replace(base_config, source=f"files:{source}"), "1/1", progress=False)
    (source / "part0.jsonl").write_text('{"text": "something else"}\n')
    with pytest.raises(UserError, match=r"cannot merge .*: the source is not what"):
        merge_worker_shards(shard_folder.parents[1], progress=False)


def test_worker_shard_of_finished_dataset_skipped(base_config: DataConfig, hashes: Hashes) -> None:
    folder = prepare(base_config, progress=False).folder
    before = hashes(folder)
    prepare_worker_shard(base_config, "1/2", progress=False)
    assert hashes(folder) == before
    assert (
        merge_worker_shards(folder, progress=False).fingerprint
        == json.loads((folder / "manifest.json").read_text())["fingerprint"]
    )


def test_prepare_reuses_finished_worker_shards(
    base_config: DataConfig, hashes: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(base_config, hashes)
    prepare_worker_shard(base_config, "1/2", progress=False)
    done: list[int] = []
    original = scheduler.tokenize_item
    monkeypatch.setattr(scheduler, "tokenize_item", lambda *args: (done.append(1), original(*args))[1])
    assert hashes(prepare(base_config, progress=False).folder) == expected
    assert len(done) == 2, "three of five files were there"


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "/3", "1/0", "-1/3", "a/b", "1/3/5", "1.5/3", "", " 1/3"])
def test_invalid_worker_shard_raises(text: str, base_config: DataConfig) -> None:
    with pytest.raises(UserError, match=r"invalid worker shard .*for example 3/16"):
        prepare_worker_shard(base_config, text, progress=False)


def test_worker_shards_partition_items_by_file(base_config: DataConfig) -> None:
    assert parse_worker_shard("3/16") == (3, 16)
    found = make_spec(base_config).work_items
    for parts in range(1, 8):
        shares = [items_of_shard(found, number, parts) for number in range(1, parts + 1)]
        assert sorted(itertools.chain(*shares)) == list(range(len(found)))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    pieces = [(replace(piece, part=part, num_parts=3),) for item in found for piece in item for part in range(3)]
    for number in (1, 2):
        files = {pieces[at][0].file.name for at in items_of_shard(pieces, number, 2)}
        others = {pieces[at][0].file.name for at in items_of_shard(pieces, 3 - number, 2)}
        assert not files & others
