"""What an estimate says agrees with what a preparation then makes, and it reads a little of one file only."""

import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub_server import HubServer

from myllm.config import DataConfig
from myllm.data.prepare import estimate as estimating
from myllm.data.prepare.estimate import Estimate, estimate
from myllm.data.prepare.prepare import prepare
from myllm.data.prepare.spec import make_spec
from myllm.errors import UserError

pytestmark = pytest.mark.usefixtures("temp_data")
WORDS = ["the", "old", "river", "ran", "under", "stone", "été", "3.14", "\n\n", "bridge,", "evening."]


def texts(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(20, 400))) for _ in range(count)]


def as_jsonl(found: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in found).encode()


def as_parquet(found: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": found, "id": range(len(found))}), out, row_group_size=100)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    ".jsonl": as_jsonl,
    ".jsonl.gz": lambda found: gzip.compress(as_jsonl(found)),
    ".parquet": as_parquet,
}


def within(estimated: float, truth: float, share: float) -> bool:
    return abs(estimated - truth) <= share * truth


def agrees(found: Estimate, documents: list[str], tokens: int) -> None:
    text_bytes = sum(len(text.encode()) for text in documents)
    assert within(found.documents, len(documents), 0.1)
    assert within(found.text_bytes, text_bytes, 0.1)
    assert within(found.tokens, tokens, 0.1)
    assert within(found.tokens / found.text_bytes, tokens / text_bytes, 0.05)
    assert found.shard_bytes == 2 * found.tokens
    assert found.hours > 0


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("suffix", WRITERS)
def test_sampled_estimate_matches_preparation(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "SAMPLE_BYTES", 60_000)
    monkeypatch.setattr(estimating, "SAMPLE_DOCUMENTS", 300)
    documents = []
    for number in range(3):
        file_texts = texts(600, seed=number)
        documents += file_texts
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / f"{number}{suffix}").write_bytes(WRITERS[suffix](file_texts))
    # Large enough not to be read whole.
    monkeypatch.setattr(estimating, "SMALL_BYTES", 0)
    config = DataConfig(source=f"files:{tmp_path / 's'}", val_tokens=500)
    found = estimate(make_spec(config), workers=2)
    counts = prepare(config, progress=False).manifest["counts"]
    assert found.sampled_documents < 600
    agrees(found, documents, counts["train_tokens"] + counts["val_tokens"])


def test_target_scales_estimate(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(texts(500)))
    recipe = make_spec(DataConfig(source=f"files:{tmp_path}"))
    whole = estimate(recipe, workers=1)
    half = estimate(recipe, workers=1, target=("tokens", whole.tokens / 2))
    assert half.fraction == pytest.approx(0.5)
    assert half.documents == pytest.approx(whole.documents / 2)
    assert half.shard_bytes == pytest.approx(whole.tokens)
    by_documents = estimate(recipe, workers=1, target=("documents", 50.0))
    assert by_documents.documents == pytest.approx(50)
    assert by_documents.tokens == pytest.approx(whole.tokens / whole.documents * 50)
    twice = estimate(recipe, workers=1, target=("bytes", 2 * whole.text_bytes))
    assert twice.fraction == pytest.approx(2)


def test_small_text_files_count_as_documents(tmp_path: Path) -> None:
    chance = random.Random(0)
    for number in range(300):
        (tmp_path / f"{number}.txt").write_text("word " * chance.randint(1, 3_000))
    found = estimate(make_spec(DataConfig(source=f"files:{tmp_path}")), workers=4)
    assert found.documents == 300
    assert found.workers == 2, "so few are two pieces of work"
    assert within(found.tokens, found.text_bytes / 5, 0.1)


def test_source_without_documents_raises(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match=r"holds no documents.*'body'"):
        estimate(make_spec(DataConfig(source=f"files:{tmp_path}")), workers=1)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_remote_estimate_downloads_little(
    suffix: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch, temp_data: Path
) -> None:
    monkeypatch.setattr(estimating, "SAMPLE_BYTES", 40_000)
    monkeypatch.setattr(estimating, "SAMPLE_DOCUMENTS", 200)
    files = {f"data/train-{n}{suffix}": WRITERS[suffix](texts(8_000, seed=n)) for n in range(3)}
    hub.add_dataset("me/texts", files)
    found = estimate(make_spec(DataConfig(source="hub:me/texts")), workers=1)
    whole = sum(map(len, files.values()))
    requested_paths = {
        request.path for request in hub.requests if "data/train" in request.path and request.method == "GET"
    }
    assert len({path.partition("?")[0].rpartition("/")[2] for path in requested_paths}) == 1, "one file, not the set"
    if suffix == ".jsonl.gz":
        assert sum(request.sent_bytes for request in hub.requests) < whole / 5
    assert within(found.documents, 24_000, 0.15)
    assert found.download_bytes == whole
    assert not list(temp_data.rglob("*.gz")), "a sample leaves nothing behind"


@cache
def rows() -> list[str]:
    return texts(4_000)


@pytest.mark.parametrize(
    ("value", "keep", "message"),
    [
        (str, 0.8, "half.parquet: not a complete parquet file"),
        (str.encode, 1, "is binary, not text"),
        (lambda text: {"a": text}, 1, "is nested; choose one of text.a"),
    ],
)
def test_unusable_parquet_raises(value: Callable[[str], object], keep: float, message: str, tmp_path: Path) -> None:
    file = tmp_path / "half.parquet"
    pq.write_table(pa.table({"text": pa.array(list(map(value, rows())))}), file)
    whole = file.read_bytes()
    assert len(whole) > estimating.SMALL_BYTES
    file.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=message):
        estimate(make_spec(DataConfig(source=f"files:{file}")), workers=1)


def test_damaged_rows_excluded_from_sample(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    spoilt = [b"\xff" + text.encode() if number % 3 == 0 else text.encode() for number, text in enumerate(rows())]
    pq.write_table(pa.table({"text": pa.array(spoilt).view(pa.string())}), file, row_group_size=500)
    content = bytearray(file.read_bytes())
    content[1_000:100_000] = random.Random(1).randbytes(99_000)  # of the first row group
    file.write_bytes(content)
    found = estimate(make_spec(DataConfig(source=f"files:{file}")), workers=1)
    assert found.sampled_documents == estimating.SAMPLE_DOCUMENTS


def test_wrong_text_key_raises(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(rows()).replace(b'{"text"', b'{"body"'))
    with pytest.raises(UserError, match=r"no documents: a.jsonl, line 1: expected .* 'text', found .*'body'"):
        estimate(make_spec(DataConfig(source=f"files:{tmp_path}")), workers=1)


def test_unavailable_parquet_raises_user_error(hub: HubServer) -> None:
    hub.add_dataset("me/some", {"data/a.parquet": as_parquet(rows())})
    recipe = make_spec(DataConfig(source="hub:me/some"))
    hub.fail_next("/api/|/resolve/|/cdn/", status=404, times=1_000, method="*")
    with pytest.raises(UserError, match=r"cannot read hf://datasets/me/some@.*/a\.parquet"):
        estimate(recipe, workers=1)


def test_missing_file_sizes_raise(hub: HubServer) -> None:
    hub.add_dataset("me/some", {"data/a.jsonl.gz": gzip.compress(as_jsonl(rows()))})
    recipe = make_spec(DataConfig(source="hub:me/some"))
    files = tuple(replace(file, size_bytes=0) for file in recipe.source.files)
    with pytest.raises(UserError, match="does not report file sizes"):
        estimate(replace(recipe, source=replace(recipe.source, files=files)), workers=1)
