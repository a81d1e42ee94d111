"""Data sets from a loopback Hub: every known corpus in its real layout, and an unreachable Dolma.

The layouts: the trees of the repositories, with fewer and smaller files.
"""

import gzip
import io
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from support.hub_server import HubServer

from myllm.config import DataConfig
from myllm.data.prepare.prepare import prepare
from myllm.data.sources.catalog import CORPORA
from myllm.data.sources.hub_listing import UnreachableError
from myllm.data.sources.source import find_source

END = 50_256
Made = tuple[dict[str, bytes], list[str], list[str]]
"""Files of a repository, which of them are to be downloaded, and the documents in them."""


def prose(seed: str, words: int = 150) -> str:
    rng = random.Random(seed)
    return f"{seed}: " + " ".join(
        rng.choice(["river", "été", "日本", "stone", "old", "🙂\n", "3.14"]) for _ in range(words)
    )


def texts(name: str, count: int = 8) -> list[str]:
    return [prose(f"{name}/{i}") for i in range(count)]


def parquet(found: list[str]) -> bytes:
    out, n = io.BytesIO(), range(len(found))
    rows = {
        "text": found,
        "id": [f"<urn:uuid:{i}>" for i in n],
        "dump": ["CC-MAIN-2024-10"] * len(found),
        "score": [*n],
    }
    pq.write_table(pa.table(rows), out, row_group_size=3)
    return out.getvalue()


def jsonl_gz(found: list[str]) -> bytes:
    lines = [json.dumps({"id": i, "text": text, "url": f"https://x/{i}"}) for i, text in enumerate(found)]
    return gzip.compress("\n".join(lines).encode() + b"\n", mtime=0)


def documents_of(folder: Path, reference: tiktoken.Encoding) -> list[str]:
    """A data set's documents in order, validation first, read only with NumPy and tiktoken."""
    found = []
    for split in ("val", "train"):
        tokens = np.concatenate([np.load(path) for path in sorted(folder.glob(f"{split}_*.npy"))])
        starts = np.flatnonzero(tokens == END)
        assert starts[0] == 0
        found += [reference.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]
    return found


def fetched(hub: HubServer) -> list[str]:
    """Names of the downloaded files, once per request."""
    return sorted(one.path.split("?")[0].split("/", 5)[5] for one in hub.seen("/cdn/"))


# -- the corpora ------------------------------------------------------------------------------------------------------


def rows_of(selected: list[str], others: list[str], write: Callable[[list[str]], bytes]) -> Made:
    files = {name: write(texts(name)) for name in [*selected, *others]} | {"README.md": b"# A card\n"}
    return files, selected, [text for name in selected for text in texts(name)]


def fineweb() -> Made:
    selected = [f"sample/10BT/{i:03d}_00000.parquet" for i in range(3)]
    return rows_of(
        selected, ["sample/100BT/000_00000.parquet", "data/CC-MAIN-2013-20/train-00000-of-00014.parquet"], parquet
    )


def c4() -> Made:
    selected = [f"en/c4-train.{i:05d}-of-01024.json.gz" for i in range(3)]
    others = ["en/c4-validation.00000-of-00008.json.gz", "en.noclean/c4-train.00000-of-07168.json.gz"]
    others += ["realnewslike/c4-train.00000-of-00512.json.gz", "multilingual/c4-en.tfrecord-00000-of-11264.json.gz"]
    return rows_of(selected, others, jsonl_gz)


def tinystories() -> Made:
    selected = [f"data/train-{i:05d}-of-00004-2d5a1467fff1081b.parquet" for i in range(4)]
    return rows_of(
        selected, ["data/validation-00000-of-00001-869c898b519ad725.parquet", "TinyStories-train.txt"], parquet
    )


def bookcorpus() -> Made:
    """One arrow stream of sentences, which become documents."""
    sentences = [prose(f"sentence {i}", 20).replace("\n", " ") for i in range(900)]
    out, schema = io.BytesIO(), pa.schema({"text": pa.string()})
    with pa.ipc.new_stream(out, schema) as stream:
        for at in range(0, len(sentences), 100):
            stream.write_batch(pa.record_batch([sentences[at : at + 100]], schema=schema))
    name = "bookcorpus/plain_text/1.0.0/abc/bookcorpus-train.arrow"
    return {name: out.getvalue(), f"{Path(name).parent}/dataset_info.json": b"{}"}, [name], sentences


def wikitext() -> Made:
    """One line per row, an empty one between paragraphs; documents are articles."""
    articles = [
        [f" = Title {i} = \n", "", f" {prose(str(i), 60)} ".replace("\n", "") + "\n", " = = A section = = \n", ""]
        for i in range(12)
    ]
    names = [f"wikitext-103-raw-v1/train-{i:05d}-of-00002.parquet" for i in range(2)]
    halves = [articles[:6], articles[6:]]
    files = {name: parquet([row for rows in half for row in rows]) for name, half in zip(names, halves, strict=True)}
    for other in ("wikitext-103-v1", "wikitext-2-raw-v1"):
        files[f"{other}/train-00000-of-00001.parquet"] = parquet(["not this"])
    files["wikitext-103-raw-v1/validation-00000-of-00001.parquet"] = parquet(["nor this"])
    documents = ["".join(row if row.endswith("\n") else f"{row}\n" for row in rows) for rows in articles]
    return files, names, documents


LAYOUTS = {
    "fineweb-edu-10bt": fineweb, "fineweb-10bt": fineweb, "c4": c4, "tinystories": tinystories,
    "bookcorpus": bookcorpus, "wikitext-103": wikitext,
}  # fmt: skip


def test_all_corpora_are_tested() -> None:
    untested = CORPORA.keys() - LAYOUTS.keys() - {"dolma", "dolma-sample"}
    assert not untested, "write a function that makes a few of its files and the documents in them, for LAYOUTS"


@pytest.mark.parametrize("name", LAYOUTS)
def test_corpus_layout_yields_documents(
    hub: HubServer, in_process: None, temp_data: Path, reference: tiktoken.Encoding, name: str
) -> None:
    files, selected, expected = LAYOUTS[name]()
    corpus = CORPORA[name]
    hub.add_dataset(corpus.repo, files, corpus.revision)
    if corpus.revision:  # what came later is not taken
        hub.add_dataset(corpus.repo, {selected[0]: parquet(["newer"])})
    dataset = prepare(DataConfig(source=name, val_tokens=500, workers=1), progress=False)
    found = documents_of(dataset.folder, reference)
    if corpus.grouping == "sentences":
        # So few long documents that one is split: every piece is there once.
        text, split = (
            "\n".join(sentence.strip() for sentence in expected),
            dataset.manifest["counts"]["documents_split"],
        )
        assert all(text.count(piece) == 1 for piece in found)
        assert sum(map(len, found)) + len(found) - 1 - split == len(text)
        assert len(found) > 2
    else:
        assert Counter(found) == Counter(expected)
    assert fetched(hub) == sorted(selected)
    assert dataset.folder.name.startswith(f"{name}-")
    assert not list(temp_data.rglob("*.arrow")) + list(temp_data.rglob("*.parquet")) + list(temp_data.rglob("*.gz"))


def dolma(hub: HubServer, mirror: HubServer, count: int = 4) -> list[str]:
    """Serve Dolma's sample, with its files as plain URLs of a mirror; returns all documents."""
    names = [f"dolma-v1_6-sample/cc_en_head/cc_en_head-{i:04d}.json.gz" for i in range(count)]
    urls = [mirror.add_plain(name, jsonl_gz(texts(name))) for name in names]
    listed = {
        "urls/v1_6-sample.txt": "\n".join(urls).encode(),
        "urls/v1_7.txt": b"https://127.0.0.1:9/not-this.json.gz",
    }
    hub.add_dataset("allenai/dolma", listed)
    return [text for name in names for text in texts(name)]


def test_dolma_read_from_urls(hub: HubServer, in_process: None, reference: tiktoken.Encoding) -> None:
    with HubServer() as mirror:
        expected = dolma(hub, mirror)
        dataset = prepare(DataConfig(source="dolma-sample", val_tokens=500, workers=1), progress=False)
        assert Counter(documents_of(dataset.folder, reference)) == Counter(expected)
        assert len(mirror.seen("/plain/", "GET")) == 4


def test_dolma_download_failure_suggests_c4(hub: HubServer, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as mirror:
        dolma(hub, mirror)
        mirror.fail_next("/plain/", times=999, retry_after=None)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        with pytest.raises(
            UnreachableError, match=r"Dolma cannot be reached: cannot download .*503.*C4 is the next best"
        ):
            prepare(DataConfig(source="dolma-sample", val_tokens=500, workers=1), progress=False)


def test_c4_fallback_for_unreachable_dolma(hub: HubServer, started: Any, reference: tiktoken.Encoding) -> None:
    files, _, expected = c4()
    hub.add_dataset("allenai/c4", files)
    hub.fail_next("allenai/dolma", times=99, retry_after=None)
    settings = {"source": "dolma-sample", "val_tokens": 500, "workers": 1}
    at_once = "import time\ntime.sleep = lambda _: None\n"
    _, errors = (alone := started.start(at_once, **settings)).communicate(timeout=240)
    assert alone.returncode
    assert "user error: Dolma cannot be reached: the Hub at http" in errors
    assert "C4 is the next best" in errors
    _, stderr = (other := started.start(at_once, **settings, fallback="c4")).communicate(timeout=240)
    assert other.returncode == 0
    assert "using c4 instead" in stderr
    assert Counter(documents_of(started.folder, reference)) == Counter(expected)


def test_default_file_selection(hub: HubServer) -> None:
    card, rows = {"README.md": b"# A card\n", "load.py": b"print()\n"}, b'{"text": "a"}\n'
    hub.add_dataset("me/rows", card | {"data/a.jsonl": rows, "notes/b.txt": b"b"})
    hub.add_dataset("me/books", card | {"books/a.txt": b"a"})
    assert [file.name for file in find_source("hub:me/rows").files] == ["data/a.jsonl"]
    assert [file.name for file in find_source("hub:me/rows:*.md").files] == ["README.md"]
    assert {file.name for file in find_source("hub:me/books").files} == {"books/a.txt", "load.py"}
