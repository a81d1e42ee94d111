"""Parse a source `datasets:NAME[:CONFIG][:SPLIT]`."""

import re
from dataclasses import dataclass
from pathlib import Path

from myllm.data.sources.local_files import glob_files
from myllm.errors import UserError, did_you_mean
from myllm.paths import user_path

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
FORM = (
    "datasets:NAMESPACE/NAME[@REVISION][:CONFIG][:SPLIT] of the Hub, or datasets:PATH[:CONFIG][:SPLIT], where PATH "
    "begins with / ./ ../ or ~"
)
MAX_NAMES = 20
_PATH_STARTS = ("/", ".", "~")


@dataclass(frozen=True)
class DatasetName:
    """Where a data set is, and which part of it is wanted."""

    where: str
    """NAMESPACE/NAME of the Hub, or an absolute path: of a folder, a file or a glob."""
    revision: str | None
    words: tuple[str, ...]
    """Configuration and split, as far as they are named."""

    @property
    def path(self) -> Path | None:
        return Path(self.where) if self.where.startswith("/") else None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return ":".join((f"datasets:{self.where}{revision}", *self.words))


def parse_name(rest: str) -> DatasetName:
    """
    Args:
        rest: what follows "datasets:".

    Raises:
        UserError: neither of the forms, or nothing at that path.
    """
    where, *words = rest.split(":")
    if len(words) > 2:
        raise UserError(f"datasets:{rest} has too many parts; expected {FORM}")
    if where.startswith(_PATH_STARTS):
        path = user_path(where).absolute()
        if not path.exists() and not glob_files(path)[0]:
            raise UserError(f"datasets:{rest}: there is nothing at {path}; expected {FORM}")
        return DatasetName(str(path), None, tuple(words))
    if not _REPOSITORY.fullmatch(where):
        hint = f"; did you mean datasets:./{rest}?" if where and user_path(where).exists() else ""
        raise UserError(f"datasets:{rest}: expected {FORM}{hint}")
    repo, _, revision = where.partition("@")
    return DatasetName(repo, revision or None, tuple(words))


def absolute_source(source: str) -> str:
    """The source with an absolute path, if it names local files."""
    kind, _, where = source.partition(":")
    if kind == "files":
        return f"files:{user_path(where).absolute()}"
    if kind == "datasets" and where.startswith(_PATH_STARTS):
        path, colon, words = where.partition(":")
        return f"datasets:{user_path(path).absolute()}{colon}{words}"
    return source


def choose_config(name: DatasetName, configs: list[str], default: str | None) -> tuple[str, str]:
    """Configuration and split ("": not named). A single word that is no configuration is a split of the default one.

    Raises:
        UserError: an unknown configuration, or none where there is no default.
    """
    config, split = (*name.words, "", "")[:2]
    if default is None and len(configs) == 1:
        default = configs[0]
    if len(name.words) == 1 and config not in configs and default is not None:
        config, split = "", config
    if config and config not in configs:
        raise UserError(
            f"{name} has no configuration {config!r}{did_you_mean(config, configs)}; it has {name_list(configs)}"
        )
    if not config and default is None:
        raise UserError(f"{name} has several configurations; add one of {name_list(configs)}, such as :{configs[0]}")
    return config or default or "", split


def choose_split(name: DatasetName, config: str, split: str, splits: list[str], configs: list[str]) -> str:
    """The named split, "train", or the only one.

    Raises:
        UserError: an unknown split, or none where there are several without "train".
    """
    if split in splits:
        return split
    where = f"{name} (configuration {config})" if len(configs) > 1 else str(name)
    if split:
        other = f", and the configurations {name_list(configs)}" if len(name.words) == 1 and len(configs) > 1 else ""
        raise UserError(
            f"{where} has no split {split!r}{did_you_mean(split, splits)}; it has {name_list(splits)}{other}"
        )
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise UserError(f"{where} has several splits, and none is named train; add one of {name_list(splits)}")


def name_list(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + rest
