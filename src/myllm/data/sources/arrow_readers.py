"""Texts from a column of parquet and arrow files, a small batch of rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .read_task import ReadTask, SkipLog

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BATCH_ROWS = 256


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
    for group in range(*task.part_range(table.num_row_groups)):
        place, first_row = f"{task.name}, row group {group}", 0
        try:
            batches = table.iter_batches(BATCH_ROWS, row_groups=[group], columns=[task.column], use_threads=False)
            for batch in batches:
                yield from _column_texts(batch.column(0), first_row, place, skips)
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
            batches = _footer_batches(file, task) if file.read(6) == b"ARROW1" else _stream_batches(file, task)
            schema = next(batches)
        except (pyarrow.ArrowException, ValueError) as error:
            raise OSError(f"not an arrow file ({error})") from None
        if not _has_text_column(schema, task, skips):
            return
        for number, batch in batches:
            place = f"{task.name}, record batch {number}"
            column = batch.column(task.column)
            if fault := _invalid_offsets(column):
                skips.add("damaged_record_batch", place, fault)
                continue
            for first_row in range(0, len(column), BATCH_ROWS):
                yield from _column_texts(column.slice(first_row, BATCH_ROWS), first_row, place, skips)


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


def _footer_batches(file: "pyarrow.MemoryMappedFile", task: ReadTask) -> Iterator[Any]:
    """The same for a file with a footer."""
    import pyarrow
    import pyarrow.ipc

    reader = pyarrow.ipc.open_file(file)
    yield reader.schema
    for number in range(*task.part_range(reader.num_record_batches)):
        try:
            yield number, reader.get_batch(number)
        except (pyarrow.ArrowException, OSError) as error:
            raise EOFError(f"record batch {number}: {error}") from None


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
    import pyarrow.types as types

    try:
        names = schema.names
    except UnicodeDecodeError as error:
        return f"column names are not UTF-8 ({error.reason})"
    if column not in names:
        return f"no column {column!r}; the file has {names}"
    if names.count(column) > 1:
        return f"several columns {column!r}"
    column_type = schema.field(column).type
    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    known = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return "" if any(matches(column_type) for matches in known) else f"column {column!r} is {column_type}, not text"


def _column_texts(column: "pyarrow.Array", first_row: int, place: str, skips: SkipLog) -> Iterator[str]:
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = _valid_texts(column, first_row, place, skips)
    for text in texts:
        yield text or ""


def _valid_texts(column: "pyarrow.Array", first_row: int, place: str, skips: SkipLog) -> Iterator[str | None]:
    for row, value in enumerate(column, first_row):
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            skips.add("invalid_utf8", f"{place}, row {row}", str(error.reason))
