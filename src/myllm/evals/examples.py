"""The questions of a task, from a local file or from the Hub."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from myllm import paths
from myllm.data.sources.download import download_file
from myllm.data.sources.hub_listing import list_hub
from myllm.data.sources.source import SourceFile
from myllm.errors import UserError
from myllm.files import parse_json
from myllm.paths import user_path

from .tasks import TASKS, Question, Row, Task

CONVERTED = "refs/convert/parquet"
"""The Hub converts every data set to parquet files in this branch, with one layout. lm-eval's rows are the same."""
SUFFIXES = (".jsonl", ".parquet")


def load_questions(
    name: str, file: str | Path | None = None, count: int | None = None, task: Task | None = None
) -> list[Question]:
    """The first `count` questions (None: all) of a .jsonl or .parquet file, or of the Hub's files, which are downloaded
    once.

    Args:
        name: of the task.
        task: a variant of TASKS[name].

    Raises:
        UserError: no such file, not in the task's format, or the download failed.
    """
    task = task or TASKS[name]
    files = _download(name, task) if file is None else [_check_file(name, Path(file))]
    rows = ((row, f"{path}, row {number:,}") for path in files for number, row in enumerate(_read_rows(path), 1))
    questions = [_to_question(task, row, position) for row, position in islice(rows, count)]
    if not questions:
        raise UserError(f"{files[0]} has no examples; expected rows such as {json.dumps(task.sample)[:300]}")
    return questions


def _download(name: str, task: Task) -> list[Path]:
    folder = paths.downloads_dir() / name
    try:
        if task.pinned:
            return [download_file(task.pinned, folder, tries=1)]  # training waits for it
        return [
            download_file(SourceFile(file.name, file.url, "parquet", file.size_bytes, file.digest), folder, tries=1)
            for file in list_hub(task.repo, CONVERTED, task.files)
        ]
    except (UserError, OSError) as error:
        reason = str(error).split(";")[0]  # the advice after it is for data sets
        raise UserError(
            f"could not download {task.repo}: {reason}. Give its rows as a .jsonl or .parquet file: {name}:FILE in "
            + (
                "`myllm eval --tasks`, or --eval.hellaswag-file"
                if name == "hellaswag"
                else "`myllm eval --tasks` or --eval.tasks"
            )
        ) from None


def _check_file(name: str, path: Path) -> Path:
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"no {name} file at {path}; expected a .jsonl or .parquet file (default: download it)")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"the {name} file {path} must end in .jsonl or .parquet")
    return path


def _read_rows(path: Path) -> Iterator[Any]:
    """
    Raises:
        UserError: the file is not readable.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _read_parquet(path)
            return
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield parse_json(line, f"{path}, line {number:,}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from None


def _to_question(task: Task, row: Any, position: str) -> Question:
    """
    Raises:
        UserError: the row is not in the task's format, or has no label.
    """
    if not _has_form_of(task.sample, row):
        form = json.dumps(task.sample)
        raise UserError(
            f"{position}: expected the fields {', '.join(task.sample)}, as in {form[:400]}; "
            f"found {json.dumps(row, default=str)[:200]}"
        )
    try:
        return task.question(row)
    except ValueError as error:
        raise UserError(f"{position}: {error}") from None


def _has_form_of(sample: Any, value: Any) -> bool:
    """Whether a value has the fields of a sample, with text where it has text. A number may be text."""
    if isinstance(sample, dict):
        return isinstance(value, dict) and all(_has_form_of(part, value.get(name)) for name, part in sample.items())
    if isinstance(sample, list):
        return isinstance(value, list) and len(value) > 0 and all(_has_form_of(sample[0], part) for part in value)
    return isinstance(value, str) or (isinstance(sample, int) and isinstance(value, int))
