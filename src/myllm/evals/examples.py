"""The questions of a task, from a local file or from the Hub. `datasets` finds the files and reads the rows."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from myllm import paths
from myllm.data.sources.download import download_file
from myllm.data.sources.hf_datasets.listing import list_dataset, open_rows, quiet
from myllm.data.sources.hf_datasets.name import parse_name
from myllm.data.sources.hub_listing import first_line
from myllm.data.sources.source import SourceFile
from myllm.errors import UserError
from myllm.paths import user_path

from .tasks import TASKS, Question, Row, Task

MODULES = {".jsonl": "json", ".parquet": "parquet"}
"""Module of `datasets` for each suffix of a local file."""


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
    if file is None:
        files, module, options = _download(name, task)
    else:
        files, module, options = [_check_file(name, Path(file))], MODULES[Path(file).suffix.lower()], {}
    rows = (
        (row, f"{path}, row {number:,}")
        for path in files
        for number, row in enumerate(_read_rows(path, module, options), 1)
    )
    questions = [_to_question(task, row, position) for row, position in islice(rows, count)]
    if not questions:
        raise UserError(f"{files[0]} has no examples; expected rows such as {json.dumps(task.sample)[:300]}")
    return questions


def _download(name: str, task: Task) -> tuple[list[Path], str, dict[str, Any]]:
    """The files of a task, and the module and settings with which `datasets` reads them."""
    folder, dataset = paths.downloads_dir() / name, parse_name(task.source)
    try:
        with quiet():
            listing = list_dataset(dataset)
            files = [SourceFile(file.name, file.url, "", file.size_bytes, file.digest) for file in listing.files]
            downloaded = [download_file(file, folder, tries=1) for file in files]  # training waits for it
    except (UserError, OSError) as error:
        reason = str(error).split(";")[0]  # the advice after it is for data sets
        raise UserError(
            f"could not download {dataset.where}: {reason}. Give its rows as a .jsonl or .parquet file: {name}:FILE in "
            f"`myllm eval --tasks`, or --eval.{'hellaswag-file' if name == 'hellaswag' else 'tasks'}"
        ) from None
    return downloaded, listing.module, listing.options


def _check_file(name: str, path: Path) -> Path:
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"no {name} file at {path}; expected a .jsonl or .parquet file (default: download it)")
    if path.suffix.lower() not in MODULES:
        raise UserError(f"the {name} file {path} must end in .jsonl or .parquet")
    return path


def _read_rows(path: Path, module: str, options: dict[str, Any]) -> Iterator[Row]:
    try:
        with quiet():
            yield from open_rows(path, module, options)
    except StopIteration:  # what `datasets` raises for an empty file
        return
    except Exception as error:  # whatever the file makes a library raise
        raise UserError(f"cannot read {path} as {module}: {first_line(error)}") from None


def _to_question(task: Task, row: Any, position: str) -> Question:
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
