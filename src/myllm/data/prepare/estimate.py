"""Estimate the tokens, disk space and time of a source from a sample."""

import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from myllm.data.sources.arrow_readers import open_parquet, table_texts
from myllm.data.sources.cleaning import clean
from myllm.data.sources.convert import fetch_file
from myllm.data.sources.documents import GROUPINGS
from myllm.data.sources.download import download_file, download_head
from myllm.data.sources.hub_listing import UnreachableError, first_line
from myllm.data.sources.read_task import ReadTask, SkipLog
from myllm.data.sources.readers import suffix_of
from myllm.data.sources.source import Source, SourceFile, read_documents
from myllm.errors import UserError

from .spec import DatasetSpec
from .work_items import order_files

SAMPLE_BYTES = 8_000_000
"""Of a file as it is stored."""
SAMPLE_DOCUMENTS = 2_000
SAMPLE_FILES = 40
"""How many small files are sampled whole."""
BATCH_DOCUMENTS = 32
"""Documents tokenized in one call, about as many as in a preparation, which decides the speed."""
SMALL_BYTES = 1_000_000


@dataclass(frozen=True)
class Estimate:
    """What a preparation would give and cost."""

    sampled_documents: int
    sampled_from: str
    documents: float
    text_bytes: float
    tokens: float
    download_bytes: float
    """Stored bytes; for local files, bytes to read."""
    shard_bytes: float
    hours: float
    """Of tokenizing alone, with `workers` processes."""
    workers: int
    fraction: float
    """Of the whole source; more than 1 if the target is larger."""


@dataclass(frozen=True)
class _Sample:
    texts: list[str]
    """Of documents."""
    stored_bytes: float
    """That hold them."""
    origin: str
    """Where they are from, for messages."""
    file_fraction: float | None = None
    """Of the source's files, if all of them are small: their number then says more than their size."""


def estimate(spec: DatasetSpec, workers: int, target: tuple[str, float] | None = None) -> Estimate:
    """Sample a source and extrapolate to all of it, or to a target amount.

    Args:
        target: ("tokens" | "bytes" | "documents", amount); bytes are of text.

    Raises:
        UserError: nothing to sample, or a source that cannot be reached.
    """
    source = spec.source
    if not all(file.size_bytes for file in source.files if file.remote):
        raise UserError(
            f"the server of {source.description} does not report file sizes, so a sample cannot be extrapolated; "
            "`myllm data prepare` works without sizes"
        )
    sample = _sample(spec)
    texts, sampled_fraction = sample.texts, sample.stored_bytes / source.size_bytes
    n_bytes = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    n_tokens, seconds = _tokenize(texts, spec)
    whole = {
        "documents": len(texts) / (sample.file_fraction or sampled_fraction),
        "bytes": n_bytes / sampled_fraction,
        "tokens": n_tokens / sampled_fraction,
    }
    fraction = target[1] / whole[target[0]] if target else 1.0
    if target is None:
        workers = min(workers, len(spec.work_items))  # one reads a text file, or many small files
    return Estimate(
        len(texts), sample.origin, documents=fraction * whole["documents"], text_bytes=fraction * whole["bytes"],
        tokens=fraction * whole["tokens"], download_bytes=fraction * source.size_bytes,
        shard_bytes=fraction * whole["tokens"] * spec.tokenizer.dtype.itemsize,
        hours=fraction * whole["bytes"] / n_bytes * seconds / workers / 3_600, workers=workers, fraction=fraction,
    )  # fmt: skip


def _sample(spec: DatasetSpec) -> _Sample:
    """Some cleaned documents. Raises UserError if there are none."""
    skips = SkipLog()
    with tempfile.TemporaryDirectory() as folder:
        sample = _read_sample(spec, Path(folder), skips)
    cleaned = (clean(text, spec.config, lambda _: None) for text in sample.texts)
    texts = [text for text in cleaned if text is not None]
    if not texts:
        reasons = "; ".join(f"{place['place']}: {place['detail'] or place['reason']}" for place in skips.places[:3])
        raise UserError(
            f"the sample of {spec.source.description} ({sample.origin}) holds no documents"
            f"{': ' + reasons if reasons else ''}"
        )
    return replace(sample, texts=texts)


def _tokenize(texts: list[str], spec: DatasetSpec) -> tuple[int, float]:
    """Tokens of the texts, and the seconds that tokenizing took."""
    spec.tokenizer.encode("warm up")
    started = time.perf_counter()
    batches = (texts[first : first + BATCH_DOCUMENTS] for first in range(0, len(texts), BATCH_DOCUMENTS))
    n_tokens = sum(len(document) for batch in batches for document in spec.tokenizer.encode_documents(batch))
    return n_tokens, time.perf_counter() - started


def _read_sample(spec: DatasetSpec, folder: Path, skips: SkipLog) -> _Sample:
    """As `_sample`, not cleaned. Downloads go to `folder`."""
    source = spec.source
    files = order_files(source.files, spec.config.shuffle_files, spec.config.shuffle_seed)
    first = files[0]
    if first.size_bytes <= SMALL_BYTES and not (first.remote or first.builder):
        chosen = files[:: max(len(files) // SAMPLE_FILES, 1)]
        texts = [text for file in chosen for text in read_documents(source, file, Path(file.location), skips)]
        size_bytes, origin = sum(file.size_bytes for file in chosen), f"{len(chosen)} of {len(files)} files"
        return _Sample(texts, size_bytes, origin, len(chosen) / len(files))
    if first.builder or suffix_of(first.name) in (".txt", ".md", ".py"):
        path = fetch_file(first, source.column, folder, folder)
        return _Sample(list(read_documents(source, first, path, skips)), first.size_bytes, first.name)
    if first.reader == "parquet":
        texts, fraction = _sample_parquet(source, first, folder, skips)
        return _Sample(texts, first.size_bytes * fraction, first.name)
    # The other kinds are read from front to back, so the beginning of the file is enough.
    path, size_bytes = download_head(first, folder, SAMPLE_BYTES)
    head_skips = SkipLog()
    texts = list(read_documents(source, first, path, head_skips))
    skips.places += [place for place in head_skips.places if place["reason"] != "file_cut_short"]
    return _Sample(texts, size_bytes, f"the first {size_bytes:,} bytes of {first.name}")


def _sample_parquet(source: Source, file: SourceFile, folder: Path, skips: SkipLog) -> tuple[list[str], float]:
    """The first rows of a parquet file, and their fraction of its rows. The Hub sends only what is read."""
    try:
        if file.location.startswith("hf://"):
            from huggingface_hub import HfFileSystem

            opened = HfFileSystem().open(file.location.removeprefix("hf://"), block_size=1 << 20)
        else:
            opened = download_file(file, folder).open("rb")
        with opened, open_parquet(opened, buffer_size=1 << 16) as table:
            # A document joined from rows has many.
            most = SAMPLE_DOCUMENTS * (20 if source.grouping != "rows" else 1)
            rows = list(islice(table_texts(table, ReadTask(folder, file.name, source.column), skips), most))
            total = table.metadata.num_rows
    except UserError:
        raise
    except Exception as error:  # the Hub client's errors have no common class over its versions
        if file.remote:
            raise UnreachableError(f"cannot read {file.location}: {first_line(error)}; check the network") from None
        if not isinstance(error, OSError):
            raise
        skips.add("unreadable_file", file.name, str(error))
        return [], 1.0
    return list(GROUPINGS[source.grouping](rows)), len(rows) / max(total, 1)
