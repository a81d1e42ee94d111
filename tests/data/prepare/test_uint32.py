"""A vocabulary above 65,536: the same data sets with four bytes a token, by every way there is to make them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.large_vocabularies import qwen3_json
from tokenizers import Tokenizer

from myllm.config import DataConfig, RunConfig
from myllm.data.dataset import Dataset
from myllm.data.prepare import work_items
from myllm.data.prepare.disk_space import check_disk
from myllm.data.prepare.estimate import estimate
from myllm.data.prepare.multi_machine import merge_worker_shards, prepare_worker_shard
from myllm.data.prepare.prepare import prepare
from myllm.data.prepare.repair import repair
from myllm.data.prepare.spec import make_spec
from myllm.paths import datasets_dir
from myllm.planning.disk import disk_estimate_bytes

END = 151_643
pytestmark = pytest.mark.usefixtures("temp_data", "in_process")


@pytest.fixture
def config(mixed_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(work_items, "SMALL_BYTES", 1)  # a file an item: five of them
    (tmp_path / "qwen3.json").write_text(qwen3_json(), encoding="utf-8")
    source, tokenizer = f"files:{mixed_corpus}", str(tmp_path / "qwen3.json")
    return DataConfig(source=source, tokenizer=tokenizer, val_tokens=500, shard_tokens=5_000, workers=1)


def test_prepare_repair_and_merge_write_identical_bytes(
    config: DataConfig, mixed_corpus: Path, hashes: Callable[[Path], dict[str, str]]
) -> None:
    folder = prepare(config, progress=False).folder
    assert json.loads((folder / "manifest.json").read_text())["dtype"] == "uint32"
    shards = [np.load(path) for path in sorted(folder.glob("*_*.npy"))]
    assert {shard.dtype.str for shard in shards} == {"<u4"}
    assert folder.joinpath("train_00000.npy").stat().st_size == 128 + 4 * 5_000

    # The documents, according to the library alone.
    library = Tokenizer.from_str(qwen3_json())
    library.encode_special_tokens = True
    lines = [line for path in mixed_corpus.iterdir() for line in path.read_text().splitlines()]
    texts = {text for line in lines if (text := json.loads(line)["text"]).strip()}
    tokens = np.concatenate(shards)
    documents = {tuple(part[1:].tolist()) for part in np.split(tokens, np.flatnonzero(tokens == END))[1:]}
    assert documents == {tuple(library.encode(text, add_special_tokens=False).ids) for text in texts}
    assert tokens.max() > 65_535 > tokens.min()

    before = hashes(folder)
    for name in ("val_00000.npy", "train_00001.npy"):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    repair(Dataset.read(folder), Dataset.read(folder).damaged(), progress=False)
    assert hashes(folder) == before

    shutil.rmtree(folder)
    for part in ("2/2", "1/2"):
        shard_folder = prepare_worker_shard(config, part, progress=False)
    # One token of an item was lost on the way: only that item is made again.
    (damaged, *_) = sorted(shard_folder.glob("*.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert hashes(merge_worker_shards(folder, progress=False).folder) == before


def test_disk_space_counts_four_bytes_per_token(config: DataConfig) -> None:
    datasets_dir().mkdir(parents=True)
    small = replace(config, tokenizer="r50k_base")
    specs = [make_spec(settings) for settings in (small, config)]
    shards = [check_disk(spec, 1).partition("(")[2].split()[:2] for spec in specs]
    assert float(shards[1][0]) == pytest.approx(2 * float(shards[0][0]), rel=0.02), shards
    found = estimate(specs[1], 1)
    assert found.shard_bytes == pytest.approx(4 * found.tokens)
    run = RunConfig()
    large = replace(run, model=replace(run.model, vocab_size=151_669))
    key = "token shards, at most"
    assert disk_estimate_bytes(large)[key] == 2 * disk_estimate_bytes(run)[key]
