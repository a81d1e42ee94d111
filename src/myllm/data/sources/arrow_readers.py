"""Texts from the columns of parquet and arrow files, a small batch of rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .read_task import ReadTask, SkipLog

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BATCH_ROWS = 256


def read_parquet(task: ReadTask, faults: SkipLog) -> Iterator[str]:
    """A column of texts, one a row. Parts are runs of row groups."""
    # Without pre_buffer, and with a buffer, a row group is read as it is used, not whole.
    with open_parquet(task.path, buffer_size=1 << 20) as table:
        yield from table_texts(table, task, faults)


def open_parquet(file: "Path | IO[bytes]", buffer_size: int) -> "pyarrow.parquet.ParquetFile":
    """
    Raises:
        OSError: no parquet file, or not a whole one.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=buffer_size)
        _ = table.schema_arrow  # is made when it is asked for
    except (pyarrow.ArrowException, ValueError) as error:
        raise OSError(f"not a whole parquet file ({error})") from None
    return table


def table_texts(table: "pyarrow.parquet.ParquetFile", task: ReadTask, faults: SkipLog) -> Iterator[str]:
    """The texts of the task's part of an opened table."""
    import pyarrow

    if not _has_texts(table.schema_arrow, task, faults):
        return
    for group in range(*task.share(table.num_row_groups)):
        place, first = f"{task.name}, row group {group}", 0
        try:
            batches = table.iter_batches(BATCH_ROWS, row_groups=[group], columns=[task.column], use_threads=False)
            for batch in batches:
                yield from _column_texts(batch.column(0), first, place, faults)
                first += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            faults.add("damaged_row_group", place, str(error))


def read_arrow(task: ReadTask, faults: SkipLog) -> Iterator[str]:
    """The same of an arrow file: a stream, as `datasets` keeps them, or one with a footer (Feather).

    Parts are runs of record batches, by where they begin, or by number where a footer says how many there are.
    """
    import pyarrow

    with pyarrow.memory_map(str(task.path)) as source:
        try:
            batches = _footer_batches(source, task) if source.read(6) == b"ARROW1" else _stream_batches(source, task)
            schema = next(batches)
        except (pyarrow.ArrowException, ValueError) as error:
            raise OSError(f"not an arrow file ({error})") from None
        if not _has_texts(schema, task, faults):
            return
        for number, batch in batches:
            place = f"{task.name}, record batch {number}"
            column = batch.column(task.column)
            if fault := _broken(column):
                faults.add("damaged_record_batch", place, fault)
                continue
            for first in range(0, len(column), BATCH_ROWS):
                yield from _column_texts(column.slice(first, BATCH_ROWS), first, place, faults)


def _stream_batches(source: "pyarrow.MemoryMappedFile", task: ReadTask) -> Iterator[Any]:
    """A stream's schema, then its record batches that begin in the task's share, with their numbers."""
    import pyarrow
    import pyarrow.ipc

    source.seek(0)
    stream = pyarrow.ipc.open_stream(source)
    yield stream.schema
    start, end = task.share(source.size())
    number = 0
    while (at := source.tell()) < end:
        try:
            batch = stream.read_next_batch()
        except StopIteration:
            return
        except (pyarrow.ArrowException, OSError) as error:
            if at < start:  # the part that it belongs to says so
                return
            raise EOFError(f"record batch {number}: {error}") from None
        if at >= start:
            yield number, batch
        number += 1


def _footer_batches(source: "pyarrow.MemoryMappedFile", task: ReadTask) -> Iterator[Any]:
    """The same of a file with a footer."""
    import pyarrow
    import pyarrow.ipc

    file = pyarrow.ipc.open_file(source)
    yield file.schema
    for number in range(*task.share(file.num_record_batches)):
        try:
            yield number, file.get_batch(number)
        except (pyarrow.ArrowException, OSError) as error:
            raise EOFError(f"record batch {number}: {error}") from None


def _broken(column: "pyarrow.Array") -> str:
    """What is wrong with where a column's texts lie, or an empty string.

    Arrow believes the offsets that a file gives: wrong ones make it read foreign memory, which kills the process.
    """
    import pyarrow
    import pyarrow.types as types

    # As bytes, so that only the offsets are looked at: text that is no UTF-8 costs its row alone.
    views = ((types.is_string, pyarrow.binary), (types.is_large_string, pyarrow.large_binary))
    view = next((kind() for check, kind in views if check(column.type)), None)
    try:
        (column.view(view) if view else column).validate(full=True)
    except pyarrow.ArrowException as error:
        return str(error)
    return ""


def _has_texts(schema: "pyarrow.Schema", task: ReadTask, faults: SkipLog) -> bool:
    """Whether the column of texts is there. Where it is not, the file's first part says so for all."""
    fault = _column_fault(schema, task.column)
    if fault and task.part == 0:
        faults.add("no_text_column", task.name, fault)
    return not fault


def _column_fault(schema: "pyarrow.Schema", column: str) -> str:
    """What keeps a column from giving texts, or an empty string."""
    import pyarrow.types as types

    try:
        names = schema.names
    except UnicodeDecodeError as error:
        return f"columns with names that are no UTF-8 ({error.reason})"
    if column not in names:
        return f"no column {column!r}, but {names}"
    if names.count(column) > 1:
        return f"several columns {column!r}"
    kind = schema.field(column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    known = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return "" if any(check(kind) for check in known) else f"the column {column!r} holds {kind}, expected texts"


def _column_texts(column: "pyarrow.Array", first: int, place: str, faults: SkipLog) -> Iterator[str]:
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = [_value_text(value, f"{place}, row {first + row}", faults) for row, value in enumerate(column)]
        texts = [text for text in texts if text is not False]
    for text in texts:
        yield text or ""


def _value_text(value: "pyarrow.Scalar", place: str, faults: SkipLog) -> str | bool | None:
    """One value's text; False for one that is not UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        faults.add("invalid_utf8", place, str(error.reason))
        return False
