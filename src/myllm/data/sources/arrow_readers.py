"""Texts from a column of parquet and arrow files, a small batch of rows at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .read_task import ReadTask, SkipLog
from .text_column import column_types, parse_text_column, row_texts

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BATCH_ROWS = 256
SKIPS_KEY = "myllm.skips"
"""Metadata of a record batch: what a conversion skipped (convert.py), a `SkipLog` as JSON."""


def read_parquet(task: ReadTask, skips: SkipLog) -> Iterator[str]:
    """One text per row. A part is a range of row groups."""
    # Without pre_buffer, and with a buffer, a row group is read as it is used instead of all at once.
    with open_parquet(task.path, buffer_size=1 << 20) as table:
        yield from table_texts(table, task, skips)


def open_parquet(file: "Path | IO[bytes]", buffer_size: int) -> "pyarrow.parquet.ParquetFile":
    """
    Raises:
        OSError: not a parquet file, or an incomplete one.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=buffer_size)
        _ = table.schema_arrow  # parsed on access
    except (pyarrow.ArrowException, ValueError) as error:
        raise OSError(f"not a complete parquet file ({error})") from None
    return table


def table_texts(table: "pyarrow.parquet.ParquetFile", task: ReadTask, skips: SkipLog) -> Iterator[str]:
    """The texts of the task's part of an open table."""
    import pyarrow

    if not _has_text_column(table.schema_arrow, task, skips):
        return
    columns = parse_text_column(task.column).top_level(table.schema_arrow.names)
    for group in range(*task.part_range(table.num_row_groups)):
        place, first_row = f"{task.name}, row group {group}", 0
        try:
            # A name selects all parts of a nested column.
            batches = table.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)
            for batch in batches:
                yield from _batch_texts(batch, task.column, first_row, place, skips)
                first_row += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            skips.add("damaged_row_group", place, str(error))


def read_arrow(task: ReadTask, skips: SkipLog) -> Iterator[str]:
    """One text per row of an arrow file: a stream, as `datasets` writes it, or a file with a footer (Feather).

    A part is a range of record batches: by the byte where they begin in a stream, by number in a file with a footer.
    """
    import pyarrow

    with pyarrow.memory_map(str(task.path)) as file:
        try:
            batches = _footer_batches(file, task, skips) if file.read(6) == b"ARROW1" else _stream_batches(file, task)
            schema = next(batches)
        except (pyarrow.ArrowException, ValueError) as error:
            raise OSError(f"not an arrow file ({error})") from None
        if not _has_text_column(schema, task, skips):
            return
        columns = parse_text_column(task.column).top_level(schema.names)
        for number, whole in batches:
            place = f"{task.name}, record batch {number}"
            batch = whole.select(columns)
            if fault := next(filter(None, map(_invalid_offsets, batch.columns)), ""):
                skips.add("damaged_record_batch", place, fault)
                continue
            for first_row in range(0, len(batch), BATCH_ROWS):
                yield from _batch_texts(batch.slice(first_row, BATCH_ROWS), task.column, first_row, place, skips)


def _stream_batches(file: "pyarrow.MemoryMappedFile", task: ReadTask) -> Iterator[Any]:
    """The schema of a stream, then number and record batch of those that begin in the task's part."""
    import pyarrow
    import pyarrow.ipc

    file.seek(0)
    stream = pyarrow.ipc.open_stream(file)
    yield stream.schema
    start, end = task.part_range(file.size())
    number = 0
    while (position := file.tell()) < end:
        try:
            batch = stream.read_next_batch()
        except StopIteration:
            return
        except (pyarrow.ArrowException, OSError) as error:
            if position < start:  # the part that holds this batch reports it
                return
            raise EOFError(f"record batch {number}: {error}") from None
        if position >= start:
            yield number, batch
        number += 1


def _footer_batches(file: "pyarrow.MemoryMappedFile", task: ReadTask, skips: SkipLog) -> Iterator[Any]:
    """The same for a file with a footer."""
    import pyarrow
    import pyarrow.ipc

    reader = pyarrow.ipc.open_file(file)
    yield reader.schema
    for number in range(*task.part_range(reader.num_record_batches)):
        try:
            batch, metadata = reader.get_batch_with_custom_metadata(number)
        except (pyarrow.ArrowException, OSError) as error:
            raise EOFError(f"record batch {number}: {error}") from None
        if metadata and SKIPS_KEY in metadata:
            skips.merge(json.loads(metadata[SKIPS_KEY]))
        yield number, batch


def _invalid_offsets(column: "pyarrow.Array") -> str:
    """What is wrong with the offsets of a column's texts, or an empty string.

    Arrow trusts the offsets in a file: wrong ones make it read foreign memory, which kills the process.
    """
    import pyarrow
    import pyarrow.types as types

    # Viewed as bytes, only the offsets are validated: text that is not UTF-8 then costs only its own row.
    views = ((types.is_string, pyarrow.binary), (types.is_large_string, pyarrow.large_binary))
    view = next((binary() for matches, binary in views if matches(column.type)), None)
    try:
        (column.view(view) if view else column).validate(full=True)
    except pyarrow.ArrowException as error:
        return str(error)
    return ""


def _has_text_column(schema: "pyarrow.Schema", task: ReadTask, skips: SkipLog) -> bool:
    """Whether the column exists and holds texts. If not, the file's first part logs it for all."""
    fault = _column_fault(schema, task.column)
    if fault and task.part == 0:
        skips.add("no_text_column", task.name, fault)
    return not fault


def _column_fault(schema: "pyarrow.Schema", column: str) -> str:
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        return f"column names are not UTF-8 ({error.reason})"
    text_column = parse_text_column(column)
    if twice := [name for name in text_column.top_level(names) if names.count(name) > 1]:
        return f"several columns {twice[0]!r}"
    return text_column.fault(dict(column_types(schema)))


def _batch_texts(
    batch: "pyarrow.RecordBatch", column: str, first_row: int, place: str, skips: SkipLog
) -> Iterator[str]:
    """The text of each row of a batch, which has the columns that `column` needs."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = list(_valid_rows(batch, first_row, place, skips))
    return row_texts(rows, parse_text_column(column), first_row, place, skips)


def _valid_rows(batch: "pyarrow.RecordBatch", first_row: int, place: str, skips: SkipLog) -> Iterator[dict[str, Any]]:
    for row in range(len(batch)):
        try:
            yield batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            skips.add("invalid_utf8", f"{place}, row {first_row + row}", str(error.reason))
