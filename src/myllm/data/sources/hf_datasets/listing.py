"""What `datasets.load_dataset` opens: the files of a configuration and split, and their rows.

Listings are cached like the Hub's. So a data set of the Hub is pinned by the first one, and a training run does not
import `datasets`. That of local files is valid while no file there changes.
"""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myllm.data.sources.hub_listing import (
    RemoteFile,
    cached,
    clear_hub_errors,
    files_of,
    find_commit,
    first_line,
    no_access_error,
    request_head,
    request_listing,
)
from myllm.data.sources.local_files import match_files
from myllm.data.sources.text_column import column_types
from myllm.errors import UserError
from myllm.files import read_json

from .name import DatasetName, choose_config, choose_split

if TYPE_CHECKING:
    from datasets import BuilderConfig, DatasetBuilder, IterableDataset

MODULES = ("arrow", "conll", "csv", "json", "parquet", "text", "webdataset")
"""Those of `datasets` that read rows of text from one file at a time. Its module for XML cannot open files (5.2)."""
OWN_SUFFIXES = {"arrow": (".arrow",), "json": (".jsonl", ".jsonl.gz", ".jsonl.zst"), "parquet": (".parquet",)}
"""By module, the files that our own readers read: faster, in parts, and row by row where one is damaged."""
STATE, SPLITS = "state.json", "dataset_dict.json"
"""Of a folder that `save_to_disk` wrote: the arrow files of a data set in order, and its splits, each a folder."""
_COMMON_FIELDS = {"name", "version", "data_dir", "data_files", "description", "features"}


@dataclass(frozen=True)
class DatasetListing:
    """The files of a split, and how `datasets` reads them."""

    config: str
    split: str
    module: str
    """Of `datasets`, such as "csv"."""
    options: dict[str, Any]
    """The module's settings, where they are not its defaults."""
    columns: dict[str, str]
    """Type of each column (text_column.column_types); empty if the first rows cannot be read."""
    files: list[RemoteFile]
    """`url` is a path for local files, which have no digest here."""


def list_dataset(name: DatasetName) -> DatasetListing:
    """
    Raises:
        UserError: nothing that `datasets` can open, or an unknown configuration or split.
        UnreachableError: the Hub does not answer.
    """
    if name.path is None:
        return cached(str(name), lambda: _request(name), _parse)
    if any((name.path / file).is_file() for file in (STATE, SPLITS)):
        return _list_saved(name, name.path)
    return cached(f"{name} {_stamp(name.path)}", lambda: _request(name), _parse)


def _parse(answer: dict[str, Any]) -> DatasetListing:
    values = {field.name: answer[field.name] for field in fields(DatasetListing)}
    return DatasetListing(**values | {"files": files_of(answer)})


def _stamp(path: Path) -> str:
    """A hash that differs after a change of any file there."""
    stamp = hashlib.sha256()
    for file in match_files(path)[0]:
        status = os.stat(file)
        stamp.update(f"{file}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode(errors="replace"))
    return stamp.hexdigest()[:16]


def _request(name: DatasetName) -> dict[str, Any]:
    with _clear_errors(name):
        import datasets
        from huggingface_hub import constants

        arguments: dict[str, Any] = {"path": name.where}
        if name.path is None:
            # Asked first: `datasets` retries for half a minute if the Hub does not answer.
            arguments["revision"] = find_commit(name.where, name.revision, always_ask=not constants.HF_HUB_OFFLINE)
        elif not name.path.is_dir():  # a file or a glob, which `datasets` takes relative to a folder
            files = glob.escape(name.where) if name.path.is_file() else name.where
            arguments = {"path": str(match_files(name.path)[1]), "data_files": files}
        configs = datasets.get_dataset_config_names(**arguments)
        default = datasets.get_dataset_default_config_name(**arguments)
        config, split = choose_config(name, configs, default)
        builder = datasets.load_dataset_builder(name=config, **arguments)
        paths = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
        split = choose_split(name, config, split, list(paths), configs)
        module = type(builder).__module__.rpartition(".")[2]
        if module not in MODULES:
            raise UserError(
                f"`datasets` reads {name} with its module {module!r}, expected one of {', '.join(MODULES)}"
                f"{_advice(name)}"
            )
        options = _options(builder.config)
        if module == "csv":  # a bad line is not the end of the first rows
            builder.config.on_bad_lines = "skip"
        columns = _first_columns(builder, split)
        listed = _local_files(paths[split]) if name.path else _hub_files(name, arguments["revision"], paths[split])
    listing = DatasetListing(config, split, module, options, columns, listed)
    return asdict(listing)


def _advice(name: DatasetName) -> str:
    return "; `files:PATH --suffix .xml .html` reads other kinds of text as it is" if name.path else ""


def _options(config: "BuilderConfig") -> dict[str, Any]:
    defaults = type(config)()
    names = [field.name for field in fields(config) if field.name not in _COMMON_FIELDS]
    found = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(defaults, name)}
    return dict(json.loads(json.dumps(found)))


def _first_columns(builder: "DatasetBuilder", split: str) -> dict[str, str]:
    try:
        rows = builder.as_streaming_dataset(split)
        schema = rows.features.arrow_schema if rows.features else None
        if schema is None:
            schema = next(iter(rows.with_format("arrow").iter(batch_size=1))).schema
    except (ValueError, StopIteration):  # a damaged file, which the preparation names, or an empty one
        return {}
    return dict(column_types(schema))


def _hub_files(name: DatasetName, commit: str, urls: list[str]) -> list[RemoteFile]:
    """With the sizes and digests that the Hub lists."""
    start = f"hf://datasets/{name.where}@{commit}/"
    inside = [url.removeprefix(start) for url in urls if url.startswith(start)]
    folder = os.path.commonpath([os.path.dirname(path) for path in inside]) if inside else ""
    listed = request_listing(name.where, commit, f"{folder}/" if folder else "") if inside else []
    known = {file.url: file for file in listed}
    return [known[url] if url in known else request_head(url) for url in urls]


def _local_files(found: list[str]) -> list[RemoteFile]:
    root = os.path.commonpath([os.path.dirname(path) for path in found])
    return [RemoteFile(os.path.relpath(path, root), path, 0, "") for path in found]


def _list_saved(name: DatasetName, folder: Path) -> DatasetListing:
    """The files of a split in a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote (datasets 5)."""
    if len(name.words) > 1 and name.words[0]:
        raise UserError(f"{name}: a folder of save_to_disk has no configurations; name the split alone")
    wanted = name.words[-1] if name.words else ""
    try:
        if (folder / SPLITS).is_file():
            split = choose_split(name, "", wanted, [str(split) for split in read_json(folder / SPLITS)["splits"]], [])
            folder /= split
        else:
            split = choose_split(name, "", wanted, [str(read_json(folder / STATE).get("_split") or "train")], [])
        files = [str(file["filename"]) for file in read_json(folder / STATE)["_data_files"]]
        columns = _arrow_columns(folder / files[0]) if files else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a complete folder of save_to_disk: {error}; save it again") from None
    return DatasetListing(
        "", split, "arrow", {}, columns, [RemoteFile(file, str(folder / file), 0, "") for file in files]
    )


def _arrow_columns(file: Path) -> dict[str, str]:
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(file)) as stream:
            return dict(column_types(pyarrow.ipc.open_stream(stream).schema))
    except pyarrow.ArrowException:  # the preparation names it
        return {}


@contextmanager
def _clear_errors(name: DatasetName) -> Iterator[None]:
    """Turn the errors of `datasets` into one sentence with a remedy."""
    try:
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise UserError(
            f"{name} needs the package `datasets`, which cannot be imported ({first_line(error)}); install it with "
            "`python -m pip install 'datasets>=4'`"
        ) from None
    hub = clear_hub_errors(name.where, name.revision) if name.path is None else nullcontext()
    with hub:
        try:
            yield
        except UserError:
            raise
        except DatasetNotFoundError:
            raise no_access_error(name.where) from None
        except (FileNotFoundError, ValueError, RuntimeError, ImportError, AttributeError, TypeError) as error:
            problem = first_line(error)
            if "with any supported extension" in problem:  # hundreds of them follow
                problem = f"it knows none of the suffixes there{_advice(name)}"
            raise UserError(f"`datasets` cannot open {name}: {problem}") from None
        except OSError as error:
            if name.path is None:
                raise
            raise UserError(f"`datasets` cannot open {name}: {first_line(error)}") from None


# -- rows -------------------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Without the messages of `datasets` and of the Hub's client: the caller reports what went wrong."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def open_rows(path: Path, module: str, options: dict[str, Any]) -> "IterableDataset":
    """The rows of a file. They are read as they are needed, and the cache of `datasets` is not used.

    Args:
        module: of `datasets`, such as "csv".
        options: its settings, where they are not the defaults.
    """
    import datasets  # takes seconds

    files = {"train": [glob.escape(str(path))]}
    return datasets.load_dataset(module, data_files=files, split="train", streaming=True, **options)
