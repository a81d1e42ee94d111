"""Which part of a row is its text.

    text                a column or key
    meta.title          a field of a nested one; of a list of objects, that field of each
    {title}\\n{text}     a template of several; {{ and }} are braces, \\n is a newline and \\t a tab

A list of texts is joined with newlines. A row whose columns are all empty gives an empty text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from string import Formatter
from typing import TYPE_CHECKING, Any

from myllm.errors import UserError

from .read_task import SkipLog

if TYPE_CHECKING:
    import pyarrow

TEXT_TYPES = ("text", "null")


class NoTextError(ValueError):
    """The row has no such column, or no text in it."""


@dataclass(frozen=True)
class TextColumn:
    """A parsed `text_column`."""

    fields: tuple[str, ...]
    """Columns, with a dot before the field of a nested one."""
    literals: tuple[str, ...] = ("", "")
    """The template's text before each of the fields, and behind the last."""

    def text_of(self, row: Mapping[str, Any]) -> str:
        """
        Raises:
            NoTextError: a column is missing, or holds something else than text.
        """
        texts = [_join(_look_up(row, field), field) for field in self.fields]
        if not any(texts):
            return ""
        pairs = zip(self.literals, texts, strict=False)
        return "".join(part for pair in pairs for part in pair) + self.literals[-1]

    def top_level(self, names: Sequence[str]) -> list[str]:
        """The columns of a table that have to be read, of those named `names`."""
        return list(dict.fromkeys(field if field in names else field.partition(".")[0] for field in self.fields))

    def fault(self, types: Mapping[str, str]) -> str:
        """Why rows of these columns (`column_types`) have no text, or an empty string."""
        return next((fault for field in self.fields if (fault := _field_fault(field, types))), "")


def row_texts(
    rows: Iterable[Mapping[str, Any]], column: TextColumn, first_row: int, place: str, skips: SkipLog
) -> Iterator[str]:
    """The text of each row. One without a text is logged with its number, counted from `first_row`."""
    for number, row in enumerate(rows, first_row):
        try:
            text = column.text_of(row)
        except NoTextError as error:
            skips.add("no_text", f"{place}, row {number}", str(error))
        else:
            yield text


@cache
def parse_text_column(text: str) -> TextColumn:
    """
    Raises:
        UserError: a malformed template.
    """
    if "{" not in text and "}" not in text:
        return TextColumn((text,))
    fields, literals = [], [""]
    try:
        # A shell passes \n as two characters.
        for literal, field, spec, conversion in Formatter().parse(text.replace("\\n", "\n").replace("\\t", "\t")):
            literals[-1] += literal
            if field is not None:
                if not field or spec or conversion:
                    raise ValueError(f"{{{field}}} must be the name of a column and nothing else")
                fields.append(field)
                literals.append("")
    except ValueError as error:
        raise UserError(f"invalid template {text!r}: {error}; expected such as '{{title}}\\n{{text}}'") from None
    if not fields:
        raise UserError(f"the template {text!r} names no column; expected such as '{{title}}\\n{{text}}'")
    return TextColumn(tuple(fields), tuple(literals))


def _look_up(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_look_up(element, path) for element in value]
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise NoTextError(f"expected an object with the key {path!r}, found a {type(value).__name__}")
    if path in value:
        return value[path]
    name, _, rest = path.partition(".")
    if not rest or name not in value:
        raise NoTextError(f"expected an object with the key {path!r}, found the keys {sorted(value)}")
    return _look_up(value[name], rest)


def _join(value: Any, field: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not any(isinstance(element, list) for element in value):
        return "\n".join(_join(element, field) for element in value)
    if isinstance(value, Mapping):
        parts = ", ".join(f"{field}.{key}" for key in value)
        raise NoTextError(f"expected a text, found an object; choose one of {parts}")
    raise NoTextError(f"expected a text in {field!r}, found {str(value)[:40]} ({type(value).__name__})")


# -- tables -----------------------------------------------------------------------------------------------------------


def column_types(fields: Iterable["pyarrow.Field"], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and type of each column; "text" for all types of text. Parts of nested columns are named with dots."""
    import pyarrow.types as types

    texts = (types.is_string, types.is_large_string, types.is_string_view)
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    for field in fields:
        kind, name = field.type, prefix + field.name
        if any(matches(kind) for matches in lists):
            kind = kind.value_type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_struct(kind):
            yield from column_types([kind.field(i) for i in range(kind.num_fields)], f"{name}.")
        else:
            yield name, "text" if any(matches(kind) for matches in texts) else str(kind)


def _field_fault(field: str, types: Mapping[str, str]) -> str:
    kind = types.get(field)
    if kind in TEXT_TYPES or types.get(field.partition(".")[0]) == "null":
        return ""
    if kind is not None:
        return f"column {field!r} is {kind}, not text"
    if parts := [name for name in types if name.startswith(f"{field}.")]:
        return f"column {field!r} is nested; choose one of {', '.join(parts)}"
    return f"no column {field!r}; the file has {list(types)}"
