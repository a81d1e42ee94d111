"""HellaSwag's examples: from a file of one's own, or the Hub's validation split at one pinned revision."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from myllm import paths
from myllm.data.sources.download import download_file
from myllm.data.sources.source import SourceFile
from myllm.errors import UserError
from myllm.files import parse_json
from myllm.paths import user_path

from .hellaswag import CHOICES, Example

PINNED = SourceFile(
    name="validation-00000-of-00001.parquet",
    where="hf://datasets/Rowan/hellaswag@218ec52e09a7e7462a5400043bb9a69a41d06b76/data/validation-00000-of-00001.parquet",
    reader="parquet",
    size_bytes=6_315_951,
    digest="899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd",
)
TEXTS = ("activity_label", "ctx_a", "ctx_b", "ctx")
SUFFIXES = (".jsonl", ".parquet")
MAX_ATTEMPTS = 3
"""A few seconds where there is no network: training waits for them, and goes on without."""


def load_examples(
    file: str | Path | None = None, count: int | None = None, pinned: SourceFile = PINNED
) -> list[Example]:
    """The first `count` examples (None: all) of a .jsonl or .parquet file, or of the Hub's, which is kept.

    Raises:
        UserError: no such file, none in HellaSwag's format, or the Hub's cannot be had.
    """
    path = _downloaded(pinned) if file is None else _local(Path(file))
    examples = []
    try:
        for number, row in enumerate(_rows_of(path), 1):
            if count is not None and number > count:
                break
            examples.append(_example(row, f"{path}, row {number:,}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not examples:
        raise UserError(f"{path} has no examples; expected HellaSwag's rows, one JSON object a line or parquet")
    return examples


def _downloaded(pinned: SourceFile) -> Path:
    try:
        return download_file(pinned, paths.downloads() / "hellaswag", tries=MAX_ATTEMPTS)
    except (UserError, OSError) as error:
        # The advice behind the semicolon is for a data set's listing, which this file has none of.
        raise UserError(
            f"HellaSwag is not to be had: {str(error).split(';')[0]}. Give its rows as a .jsonl or .parquet file, "
            "--hellaswag-file to `myllm eval` and --eval.hellaswag-file to training"
        ) from None


def _local(path: Path) -> Path:
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"no HellaSwag file at {path}; give a .jsonl or .parquet file, or none to take the Hub's")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"the HellaSwag file {path} is a {path.suffix or 'file without suffix'}; expected .jsonl or .parquet"
        )
    return path


def _rows_of(path: Path) -> Iterator[Any]:
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_json(line, f"{path}, line {number:,}")


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from None


def _example(row: Any, place: str) -> Example:
    """
    Raises:
        UserError: the row is none of HellaSwag's, or has no label, as those of its test split.
    """
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object with HellaSwag's fields, found {row!r:.80}")
    wrong = [name for name in TEXTS if not isinstance(row.get(name), str)]
    if wrong:
        raise UserError(f"{place}: {', '.join(wrong)} must be texts; found the fields {', '.join(map(str, row))}")
    endings, label = row.get("endings"), str(row.get("label"))
    if not isinstance(endings, list) or len(endings) != CHOICES or not all(isinstance(each, str) for each in endings):
        raise UserError(f"{place}: endings must be {CHOICES} texts, found {endings!r:.80}")
    if label not in map(str, range(CHOICES)):
        raise UserError(f"{place}: label must be 0 to {CHOICES - 1}, found {label!r:.80}; the test split has none")
    return Example(*(row[name] for name in TEXTS), endings=tuple(endings), label=int(label))
