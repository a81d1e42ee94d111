"""How command lines are parsed: tyro, with numbers such as 500M and help that fits the terminal."""

import dataclasses
import functools
import inspect
import operator
import platform
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Annotated, Any

import docstring_parser
import tyro
from tyro.constructors import (
    MISSING,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
    UnsupportedTypeAnnotationError,
)

from myllm.formatting import parse_count

NONE = "None"


def parse_arguments(
    target: Callable[..., Any], words: Sequence[str], prog: str, default: Any = None, description: str | None = None
) -> Any:
    """Call a function, or build a dataclass, from the words of a command line.

    Help shows positional arguments by their names: RUN, SOURCE.

    Raises:
        SystemExit: code 0 after --help, code 2 for an error.
    """
    options = {} if default is None else {"default": default}
    width = shutil.get_terminal_size().columns
    paragraphs = (description or inspect.getdoc(target) or "").partition("\nArgs:")[0].split("\n\n")
    # tyro joins lines unless they begin with a space.
    paragraphs = [textwrap.fill(" ".join(text.split()), width, subsequent_indent=" ") for text in paragraphs]
    if inspect.isfunction(target):
        target = _with_reflowed_help(target)
    return tyro.cli(
        target, args=words, prog=prog, description="\n\n".join(paragraphs), registry=_registry(),
        config=(tyro.conf.PositionalMetavarFromFieldName,), **options,
    )  # fmt: skip


def wrap_help(text: str) -> str:
    """Wrap a hand-formatted help text at the width of the terminal.

    The text after a name, as in "  --option  what it does" or "usage: program", stays in its column.
    """
    width, lines = shutil.get_terminal_size().columns, []
    for line in text.splitlines():
        name = re.match(r"usage: (\S+ )?|  \S.*?  +", line)
        lines += textwrap.wrap(
            line, width, subsequent_indent=" " * (name.end() if name else 0),
            break_long_words=False, break_on_hyphens=False,
        ) or [""]  # fmt: skip
    return "\n".join(lines)


def version() -> str:
    """The versions for a bug report, on one line."""
    try:
        torch = f"torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        torch = "no torch"
    return f"myllm {metadata.version('myllm')}, Python {platform.python_version()}, {torch}"


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.struct_rule(_dataclass)
    registry.primitive_rule(_integer)
    registry.primitive_rule(_optional)
    return registry


def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Show `X | None` as X; the help text or the default says what None means."""
    choices = typing.get_args(info.type)
    if info.type_origin not in (types.UnionType, typing.Union) or types.NoneType not in choices:
        return None
    rest = functools.reduce(operator.or_, [choice for choice in choices if choice is not types.NoneType])
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(rest, info.markers))
    if isinstance(inner, UnsupportedTypeAnnotationError) or inner.nargs != 1:
        return None
    return dataclasses.replace(
        inner,
        instance_from_str=lambda words: None if words == [NONE] else inner.instance_from_str(words),
        is_instance=lambda value: value is None or inner.is_instance(value),
        str_from_instance=lambda value: [NONE] if value is None else inner.str_from_instance(value),
    )


def _integer(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """An int may be written 500M or 10BT."""
    if info.type is not int:
        return None

    def parse(words: list[str]) -> int:
        try:
            return int(words[0])
        except ValueError:
            return parse_count(words[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


def _dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass whose fields are documented by the strings below them."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = typing.get_type_hints(info.type, include_extras=True)
    help_of: dict[str, str] = {}
    for base in reversed(info.type.__mro__[:-1]):
        help_of |= argument_help(base)
    return StructConstructorSpec(
        instantiate=info.type,
        fields=tuple(
            StructFieldSpec(
                name=field.name,
                type=_type(hints, field),
                default=_default(info, field),
                helptext=help_of.get(field.name),
            )
            for field in dataclasses.fields(info.type)
        ),
    )


def _type(hints: dict[str, Any], field: dataclasses.Field) -> Any:
    """A field's type, with the name of its option if that is another: `from` cannot be a field."""
    hint, option = hints[field.name], field.metadata.get("option")
    return Annotated[hint, tyro.conf.arg(name=option)] if option else hint


def _default(info: StructTypeInfo, field: dataclasses.Field) -> Any:
    if isinstance(info.default, info.type):
        return getattr(info.default, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    return MISSING if field.default_factory is dataclasses.MISSING else field.default_factory()


def _with_reflowed_help(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with each argument's help on one line: tyro would keep the docstring's line breaks."""

    def call(*values: Any, **named: Any) -> Any:
        return function(*values, **named)

    described: Any = call
    described.__doc__ = re.sub(r"\n {8}", " ", inspect.getdoc(function) or "")
    described.__signature__, described.__annotations__ = inspect.signature(function), function.__annotations__
    return described


def argument_help(described: Any) -> dict[str, str]:
    """The help of each argument or field, without the line breaks of its docstring."""
    found = docstring_parser.parse_from_object(described).params
    return {entry.arg_name: " ".join(entry.description.split()) for entry in found if entry.description}
