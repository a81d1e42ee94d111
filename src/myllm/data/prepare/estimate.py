"""What a source would give and cost, from a sample of one file."""

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
from myllm.data.sources.documents import group_rows
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
"""Small files are sampled whole, this many of them."""
TOGETHER = 32
"""Documents tokenised in one call: for the speed, about as many as preparing takes at once."""
SMALL_BYTES = 1_000_000


@dataclass(frozen=True)
class Figure:
    """A number, and half the width of its 95 % interval."""

    value: float
    error: float


@dataclass(frozen=True)
class Estimate:
    sampled_documents: int
    sampled_from: str
    documents: Figure
    text_bytes: Figure
    tokens: Figure
    tokens_per_byte: Figure
    download_bytes: Figure
    """As stored; what is read where nothing is downloaded."""
    shard_bytes: Figure
    hours: Figure
    """With `workers` processes, tokenising alone."""
    workers: int
    share: float
    """Of the whole source."""


def estimate(recipe: DatasetSpec, workers: int, target: tuple[str, float] | None = None) -> Estimate:
    """Sample a source and say what all of it, or a target amount of it, comes to.

    Args:
        target: ("tokens" | "bytes" | "documents", how many); bytes are of text.

    Raises:
        UserError: nothing to sample, or a source that cannot be reached.
    """
    source, faults = recipe.source, SkipLog()
    if not all(file.size_bytes for file in source.files if file.remote):
        raise UserError(
            f"the server of {source.description} does not say how large its files are, so a sample says nothing of "
            "the whole; `myllm data prepare` needs no sizes"
        )
    with tempfile.TemporaryDirectory() as folder:
        by_file, stored_bytes, names = _sample(source, recipe, Path(folder), faults)
    by_file = [_cleaned(texts, recipe) for texts in by_file]
    texts = [text for some in by_file for text in some]
    if not texts:
        seen = "; ".join(f"{place['place']}: {place['detail'] or place['reason']}" for place in faults.places[:3])
        raise UserError(f"the sample of {source.description} ({names}) holds no documents{': ' + seen if seen else ''}")
    n_bytes = np.array([len(text.encode(errors="surrogatepass")) for text in texts], dtype=float)
    n_tokens, seconds = _tokenised(texts, recipe)
    bytes_per_s = n_bytes.sum() / seconds
    amounts = {
        "stored": float(source.size_bytes),
        "bytes": n_bytes.sum() / stored_bytes * source.size_bytes,
        "tokens": n_tokens.sum() / stored_bytes * source.size_bytes,
        "documents": len(texts) / stored_bytes * source.size_bytes,
    }
    documents_error = _ratio_error(np.ones(len(texts)), n_bytes)
    if len(by_file) > 1:  # whole files: how many documents there are follows from how many files there are
        counts = np.array([len(some) for some in by_file], dtype=float)
        amounts["documents"] = counts.mean() * len(source.files)
        documents_error = _ratio_error(counts, np.ones(len(counts)))
    # A sample that is a good part of all leaves little to be wrong about.
    unseen = math.sqrt(max(1 - stored_bytes / source.size_bytes, 0))
    errors = {
        "text a stored byte": _packing_error(texts, n_bytes, source) * unseen,
        "tokens a byte": _ratio_error(n_tokens, n_bytes) * unseen,
        "documents a byte": documents_error * unseen,
    }
    share = 1.0 if target is None else target[1] / amounts[target[0]]

    def part(name: str, factor: float = 1.0) -> Figure:
        """What the share comes to, with the errors of the ratios that lie between it and what is known."""
        known = target[0] if target else "stored"
        between = [errors[ratio] ** 2 for ratio in _RATIOS[name] ^ _RATIOS[known]]
        value = amounts[name] * share * factor
        return Figure(value, value * math.sqrt(sum(between)))

    ratio = float(n_tokens.sum() / n_bytes.sum())
    return Estimate(
        sampled_documents=len(texts), sampled_from=names, documents=part("documents"), text_bytes=part("bytes"),
        tokens=part("tokens"),
        tokens_per_byte=Figure(ratio, ratio * errors["tokens a byte"]),
        download_bytes=part("stored"), shard_bytes=part("tokens", 2),
        hours=part("bytes", 1 / bytes_per_s / workers / 3_600), workers=workers, share=share,
    )  # fmt: skip


def _cleaned(texts: list[str], recipe: DatasetSpec) -> list[str]:
    return [cleaned for text in texts if (cleaned := clean(text, recipe.config, lambda _: None)) is not None]


def _tokenised(texts: list[str], recipe: DatasetSpec) -> tuple[np.ndarray, float]:
    """Tokens of each text, (texts,) float64, and the seconds that it took."""
    recipe.tokenizer.encode("warm up")
    started = time.perf_counter()
    together = (texts[first : first + TOGETHER] for first in range(0, len(texts), TOGETHER))
    encoded = [document for some in together for document in recipe.tokenizer.encode_documents(some)]
    return np.array([len(document) for document in encoded], dtype=float), time.perf_counter() - started


_RATIOS: dict[str, frozenset[str]] = {
    "stored": frozenset(),
    "bytes": frozenset({"text a stored byte"}),
    "tokens": frozenset({"text a stored byte", "tokens a byte"}),
    "documents": frozenset({"text a stored byte", "documents a byte"}),
}
"""How each amount follows from the stored bytes."""


def _ratio_error(above: np.ndarray, below: np.ndarray) -> float:
    """Half the 95 % interval of a ratio of sums, relative to it; 1 where one document says nothing about others.

    Source: Cochran 1977, "Sampling Techniques", equation 6.13.
    """
    n = len(above)
    if n < 2:
        return 1.0
    ratio = above.sum() / below.sum()
    return float(1.96 * (above - ratio * below).std(ddof=1) / math.sqrt(n) / below.mean() / ratio)


def _packing_error(texts: list[str], n_bytes: np.ndarray, source: Source) -> float:
    """How well the sample knows what a stored byte unpacks to: plain files exactly, packed ones as documents differ.

    zlib stands in for the file's own compression.
    """
    if suffix_of(source.files[0].name) in (".txt", ".md", ".py", ".jsonl", ".arrow"):
        return 0.0
    packed = np.array([len(zlib.compress(text.encode(errors="surrogatepass"), 1)) for text in texts], dtype=float)
    return _ratio_error(n_bytes, packed)


def _sample(source: Source, recipe: DatasetSpec, folder: Path, faults: SkipLog) -> tuple[list[list[str]], float, str]:
    """Some documents, how many stored bytes they stand for, and where they are from.

    Documents are in one list, or in one a file where several files were read whole.
    """
    files = order_files(source.files, recipe.config.shuffle_files, recipe.config.shuffle_seed)
    first = files[0]
    if first.size_bytes <= SMALL_BYTES and not first.remote:
        chosen = files[:: max(len(files) // SAMPLE_FILES, 1)]
        by_file = [list(read_documents(source, file, Path(file.location), faults)) for file in chosen]
        return by_file, sum(file.size_bytes for file in chosen), f"{len(chosen)} of {len(files)} files"
    if first.reader == "parquet":
        texts, share = _sample_parquet(source, first, folder, faults)
        return [texts], first.size_bytes * share, first.name
    if suffix_of(first.name) in (".txt", ".md", ".py"):
        path = download_file(first, folder)
        return [list(read_documents(source, first, path, faults))], first.size_bytes, first.name
    # The beginning of the file does for kinds that are read from front to back; that it ends early is no fault.
    path, size_bytes = download_head(first, folder, SAMPLE_BYTES)
    seen = SkipLog()
    texts = list(read_documents(source, first, path, seen))
    faults.places += [place for place in seen.places if place["reason"] != "file_cut_short"]
    return [texts], size_bytes, f"the first {size_bytes:,} bytes of {first.name}"


def _sample_parquet(source: Source, file: SourceFile, folder: Path, faults: SkipLog) -> tuple[list[str], float]:
    """The first rows of a parquet file, and which share of its rows they are; the Hub sends only what is read."""
    try:
        if file.location.startswith("hf://"):
            from huggingface_hub import HfFileSystem

            opened = HfFileSystem().open(file.location.removeprefix("hf://"), block_size=1 << 20)
        else:
            opened = download_file(file, folder).open("rb")
        with opened, open_parquet(opened, buffer_size=1 << 16) as table:
            # Rows that are joined into documents are many more than documents.
            most = SAMPLE_DOCUMENTS * (20 if source.grouping != "rows" else 1)
            rows = list(islice(table_texts(table, ReadTask(folder, file.name, source.column), faults), most))
            total = table.metadata.num_rows
    except UserError:
        raise
    except Exception as error:  # the client's errors have no common class over its versions
        if file.remote:
            raise UnreachableError(f"cannot read {file.location}: {first_line(error)}; check the network") from None
        if not isinstance(error, OSError):
            raise
        faults.add("unreadable_file", file.name, str(error))
        return [], 1.0
    return list(group_rows(rows, source.grouping)), len(rows) / max(total, 1)
