"""Estimate the tokens, disk space and time of a source from a sample."""

import math
import tempfile
import time
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

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
class Figure:
    """An estimate, and half the width of its 95% interval."""

    value: float
    error: float


@dataclass(frozen=True)
class Estimate:
    """What a preparation would give and cost."""

    sampled_documents: int
    sampled_from: str
    documents: Figure
    text_bytes: Figure
    tokens: Figure
    tokens_per_byte: Figure
    download_bytes: Figure
    """Stored bytes; for local files, bytes to read."""
    shard_bytes: Figure
    hours: Figure
    """Of tokenizing alone, with `workers` processes."""
    workers: int
    fraction: float
    """Of the whole source; more than 1 if the target is larger."""


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
    by_file, stored_bytes, names = _sample(spec)
    texts = [text for file_texts in by_file for text in file_texts]
    n_bytes = np.array([len(text.encode(errors="surrogatepass")) for text in texts], dtype=float)
    n_tokens, seconds = _tokenize(texts, spec)
    bytes_per_s = n_bytes.sum() / seconds
    amounts = {
        "stored": float(source.size_bytes),
        "bytes": n_bytes.sum() / stored_bytes * source.size_bytes,
        "tokens": n_tokens.sum() / stored_bytes * source.size_bytes,
        "documents": len(texts) / stored_bytes * source.size_bytes,
    }
    documents_error = _ratio_error(np.ones(len(texts)), n_bytes)
    if len(by_file) > 1:  # whole files: the number of files gives the number of documents
        counts = np.array([len(file_texts) for file_texts in by_file], dtype=float)
        amounts["documents"] = counts.mean() * len(source.files)
        documents_error = _ratio_error(counts, np.ones(len(counts)))
    # The finite population correction: a sample that is a large part of the source leaves little error.
    unseen = math.sqrt(max(1 - stored_bytes / source.size_bytes, 0))
    errors = {
        "text per stored byte": _packing_error(texts, n_bytes, source) * unseen,
        "tokens per byte": _ratio_error(n_tokens, n_bytes) * unseen,
        "documents per byte": documents_error * unseen,
    }
    fraction = 1.0 if target is None else target[1] / amounts[target[0]]

    def figure(name: str, factor: float = 1.0) -> Figure:
        """An amount of the target, with the errors of the ratios between it and the amount that is known."""
        known = target[0] if target else "stored"
        squares = [errors[ratio] ** 2 for ratio in _RATIOS[name] ^ _RATIOS[known]]
        value = amounts[name] * fraction * factor
        return Figure(value, value * math.sqrt(sum(squares)))

    ratio = float(n_tokens.sum() / n_bytes.sum())
    return Estimate(
        sampled_documents=len(texts), sampled_from=names, documents=figure("documents"), text_bytes=figure("bytes"),
        tokens=figure("tokens"),
        tokens_per_byte=Figure(ratio, ratio * errors["tokens per byte"]),
        download_bytes=figure("stored"), shard_bytes=figure("tokens", spec.tokenizer.dtype.itemsize),
        hours=figure("bytes", 1 / bytes_per_s / workers / 3_600), workers=workers, fraction=fraction,
    )  # fmt: skip


def _sample(spec: DatasetSpec) -> tuple[list[list[str]], float, str]:
    """Some cleaned documents, the stored bytes they stand for, and where they are from.

    The documents are in one list, or in one list per file if several files were read whole.

    Raises:
        UserError: there are none.
    """
    skips = SkipLog()
    with tempfile.TemporaryDirectory() as folder:
        by_file, stored_bytes, names = _read_sample(spec, Path(folder), skips)
    by_file = [
        [cleaned for text in texts if (cleaned := clean(text, spec.config, lambda _: None)) is not None]
        for texts in by_file
    ]
    if not any(by_file):
        reasons = "; ".join(f"{place['place']}: {place['detail'] or place['reason']}" for place in skips.places[:3])
        raise UserError(
            f"the sample of {spec.source.description} ({names}) holds no documents{': ' + reasons if reasons else ''}"
        )
    return by_file, stored_bytes, names


def _tokenize(texts: list[str], spec: DatasetSpec) -> tuple[np.ndarray, float]:
    """Tokens of each text, (texts,) float64, and the seconds that took."""
    spec.tokenizer.encode("warm up")
    started = time.perf_counter()
    batches = (texts[first : first + BATCH_DOCUMENTS] for first in range(0, len(texts), BATCH_DOCUMENTS))
    encoded = [document for batch in batches for document in spec.tokenizer.encode_documents(batch)]
    return np.array([len(document) for document in encoded], dtype=float), time.perf_counter() - started


_RATIOS: dict[str, frozenset[str]] = {
    "stored": frozenset(),
    "bytes": frozenset({"text per stored byte"}),
    "tokens": frozenset({"text per stored byte", "tokens per byte"}),
    "documents": frozenset({"text per stored byte", "documents per byte"}),
}
"""The ratios by which each amount follows from the stored bytes."""


def _ratio_error(above: np.ndarray, below: np.ndarray) -> float:
    """Half the 95% interval of a ratio of sums, relative to it; 1 for fewer than two documents.

    Source: Cochran 1977, "Sampling Techniques", equation 6.13.
    """
    n = len(above)
    if n < 2:
        return 1.0
    ratio = above.sum() / below.sum()
    return float(1.96 * (above - ratio * below).std(ddof=1) / math.sqrt(n) / below.mean() / ratio)


def _packing_error(texts: list[str], n_bytes: np.ndarray, source: Source) -> float:
    """Error of the text per stored byte: 0 for plain files. zlib stands in for the compression of other files."""
    if suffix_of(source.files[0].name) in (".txt", ".md", ".py", ".jsonl", ".arrow"):
        return 0.0
    packed = np.array([len(zlib.compress(text.encode(errors="surrogatepass"), 1)) for text in texts], dtype=float)
    return _ratio_error(n_bytes, packed)


def _read_sample(spec: DatasetSpec, folder: Path, skips: SkipLog) -> tuple[list[list[str]], float, str]:
    """As `_sample`, not cleaned. Downloads go to `folder`."""
    source = spec.source
    files = order_files(source.files, spec.config.shuffle_files, spec.config.shuffle_seed)
    first = files[0]
    if first.builder:
        path = fetch_file(first, source.column, folder, folder)
        return [list(read_documents(source, first, path, skips))], first.size_bytes, first.name
    if first.size_bytes <= SMALL_BYTES and not first.remote:
        chosen = files[:: max(len(files) // SAMPLE_FILES, 1)]
        by_file = [list(read_documents(source, file, Path(file.location), skips)) for file in chosen]
        return by_file, sum(file.size_bytes for file in chosen), f"{len(chosen)} of {len(files)} files"
    if first.reader == "parquet":
        texts, fraction = _sample_parquet(source, first, folder, skips)
        return [texts], first.size_bytes * fraction, first.name
    if suffix_of(first.name) in (".txt", ".md", ".py"):
        path = download_file(first, folder)
        return [list(read_documents(source, first, path, skips))], first.size_bytes, first.name
    # These kinds are read from front to back, so the beginning of the file is enough.
    path, size_bytes = download_head(first, folder, SAMPLE_BYTES)
    head_skips = SkipLog()
    texts = list(read_documents(source, first, path, head_skips))
    skips.places += [place for place in head_skips.places if place["reason"] != "file_cut_short"]
    return [texts], size_bytes, f"the first {size_bytes:,} bytes of {first.name}"


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
