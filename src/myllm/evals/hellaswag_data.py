"""HellaSwag's examples, from a local file or from the Hub's validation split at a pinned revision."""

from collections.abc import Iterator
from itertools import islice
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
    location="hf://datasets/Rowan/hellaswag@218ec52e09a7e7462a5400043bb9a69a41d06b76/data/validation-00000-of-00001.parquet",
    reader="parquet",
    size_bytes=6_315_951,
    digest="899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd",
)
TEXT_FIELDS = ("activity_label", "ctx_a", "ctx_b", "ctx")
SUFFIXES = (".jsonl", ".parquet")


def load_examples(
    file: str | Path | None = None, count: int | None = None, pinned: SourceFile = PINNED
) -> list[Example]:
    """The first `count` examples (None: all) of a .jsonl or .parquet file, or of the Hub's file, which is downloaded
    once.

    Raises:
        UserError: no such file, not in HellaSwag's format, or the download failed.
    """
    path = _download(pinned) if file is None else _check_file(Path(file))
    try:
        rows = islice(_read_rows(path), count)
        examples = [_to_example(row, f"{path}, row {number:,}") for number, row in enumerate(rows, 1)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not examples:
        raise UserError(f"{path} has no examples; expected HellaSwag's rows, as parquet or one JSON object per line")
    return examples


def _download(pinned: SourceFile) -> Path:
    try:
        return download_file(pinned, paths.downloads_dir() / "hellaswag", tries=1)  # training waits for it
    except (UserError, OSError) as error:
        reason = str(error).split(";")[0]  # the advice after it is for data sets
        raise UserError(
            f"could not download HellaSwag: {reason}. Give its rows as a .jsonl or .parquet file, with "
            "--hellaswag-file to `myllm eval` or --eval.hellaswag-file to training"
        ) from None


def _check_file(path: Path) -> Path:
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"no HellaSwag file at {path}; expected a .jsonl or .parquet file (default: download it)")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"the HellaSwag file {path} must end in .jsonl or .parquet")
    return path


def _read_rows(path: Path) -> Iterator[Any]:
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise UserError(f"{path} is not a readable parquet file: {error}") from None
        return
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_json(line, f"{path}, line {number:,}")


def _to_example(row: Any, position: str) -> Example:
    """
    Raises:
        UserError: the row is not in HellaSwag's format, or has no label, like those of the test split.
    """
    if not isinstance(row, dict):
        raise UserError(f"{position}: expected an object with HellaSwag's fields, found {row!r:.80}")
    wrong = [name for name in TEXT_FIELDS if not isinstance(row.get(name), str)]
    if wrong:
        raise UserError(f"{position}: {', '.join(wrong)} must be strings; found the fields {', '.join(map(str, row))}")
    endings, label = row.get("endings"), str(row.get("label"))
    if not isinstance(endings, list) or len(endings) != CHOICES or not all(isinstance(text, str) for text in endings):
        raise UserError(f"{position}: endings must be {CHOICES} strings, found {endings!r:.80}")
    if label not in map(str, range(CHOICES)):
        raise UserError(
            f"{position}: label must be 0 to {CHOICES - 1}, found {label!r:.80}; the test split has no labels"
        )
    return Example(**{name: row[name] for name in TEXT_FIELDS}, endings=tuple(endings), label=int(label))
