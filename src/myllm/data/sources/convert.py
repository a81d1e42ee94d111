"""A file that only `datasets` can read, as an arrow file of its texts.

The conversion takes the place of a download: it happens once, ahead of the workers, and they read any part of the arrow
file at once. So a large file keeps all of them busy, and a restart repeats no finished part.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myllm.errors import out_of_space
from myllm.files import atomic_write, file_lock

from .arrow_readers import BATCH_ROWS, SKIPS_KEY
from .download import download_file, local_path
from .hf_datasets.listing import open_rows, quiet
from .hub_listing import first_line
from .read_task import SkipLog
from .source import SourceFile
from .text_column import column_types, parse_text_column, row_texts

if TYPE_CHECKING:
    import pyarrow

READ_ROWS = 1_000


def converted_path(file: SourceFile, folder: Path) -> Path:
    """Where the arrow file of a file is, or will be."""
    digest = hashlib.sha256(file.name.encode(errors="surrogateescape")).hexdigest()
    return folder / f"{digest[:32]}.arrow"


def fetch_file(file: SourceFile, column: str, folder: Path, downloads: Path, kept: Path | None = None) -> Path:
    """The path of a file that our own readers can read: downloaded, and converted where that is necessary.

    Args:
        folder: for the converted file.
        downloads, kept: as in `download_file`. What is downloaded to `folder` is deleted after its conversion.

    Raises:
        UnreachableError, UserError: as `download_file`.
    """
    if not file.builder:
        return download_file(file, downloads, kept)
    path = converted_path(file, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            original = download_file(file, downloads, kept)
            _convert(file, original, column, path)
            if file.remote and original == local_path(file, folder):
                original.unlink(missing_ok=True)
    return path


def _convert(file: SourceFile, original: Path, column: str, out: Path) -> None:
    import pyarrow
    import pyarrow.ipc

    schema = pyarrow.schema({"text": pyarrow.large_string()})
    skips, batch = SkipLog(), list[str]()
    # Renamed when it is complete; not synced, as downloads are: a restart checks the tokens, not the text.
    with atomic_write(out, durable=False) as opened, pyarrow.ipc.new_file(opened, schema) as writer:
        for text in _texts(file, original, column, skips):
            batch.append(text)
            if len(batch) == BATCH_ROWS:
                writer.write_batch(pyarrow.record_batch([batch], schema=schema))
                batch = []
        # The log is part of the file, so that it is read exactly once.
        log = json.dumps({"counts": skips.counts, "places": skips.places})
        writer.write_batch(pyarrow.record_batch([batch], schema=schema), custom_metadata={SKIPS_KEY: log})


def _texts(file: SourceFile, original: Path, column: str, skips: SkipLog) -> Iterator[str]:
    text_column, first_row, last_fault = parse_text_column(column), 0, ""
    try:
        for table in _tables(file, original, column, skips):
            fault = text_column.fault(dict(column_types(table.schema)))
            if fault and fault != last_fault:
                skips.add("no_text_column", f"{file.name}, from row {first_row} on", fault)
            last_fault = fault
            rows = [] if fault else table.select(text_column.top_level(table.column_names)).to_pylist()
            yield from row_texts(rows, text_column, first_row, file.name, skips)
            first_row += len(table)
    except Exception as error:  # whatever the file makes a library raise
        if out_of_space(error):
            raise
        place = file.name if not first_row else f"{file.name}, after row {first_row - 1}"
        skips.add("unreadable_file", place, first_line(error).replace(str(original), file.name))


def _tables(file: SourceFile, original: Path, column: str, skips: SkipLog) -> Iterator["pyarrow.Table"]:
    """The rows as `datasets` reads them."""
    import pyarrow

    builder = json.loads(file.builder)
    options: dict[str, Any] = builder["options"]
    if builder["module"] == "csv":
        # The text as it stands in the file: neither "007" nor "NA" becomes a number or nothing.
        fields = parse_text_column(column).fields
        options = {"na_filter": False, "converters": dict.fromkeys(fields, str), "on_bad_lines": "warn"} | options
    with quiet(), warnings.catch_warnings(record=True) as bad_lines:
        warnings.simplefilter("always")
        rows = open_rows(original, builder["module"], options)
        tables = rows.with_format("arrow").iter(batch_size=READ_ROWS)
        if builder["module"] == "webdataset":  # whose tables differ in the order of their columns
            tables = map(pyarrow.table, rows.iter(batch_size=READ_ROWS))
        for table in tables:
            _log_bad_lines(bad_lines, file.name, skips)
            yield table
        _log_bad_lines(bad_lines, file.name, skips)


def _log_bad_lines(seen: list[warnings.WarningMessage], name: str, skips: SkipLog) -> None:
    """pandas warns of each line that it skips: "Skipping line 3: expected 2 fields, saw 4"."""
    for warning in seen:
        for line in str(warning.message).splitlines():
            if line.startswith("Skipping line "):
                number, _, reason = line.removeprefix("Skipping line ").partition(": ")
                skips.add("invalid_csv", f"{name}, record {number}", reason)  # a record may be several lines
    seen.clear()
