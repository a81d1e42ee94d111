"""Verify checkpoints: by their manifest, their name, and the content or sizes of their files."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from myllm.distributed.collectives import all_gather_object, broadcast_object, group_rank
from myllm.errors import UserError
from myllm.files import file_sha256, read_json

from .layout import (
    CONFIG_FILE,
    FORMAT,
    MANIFEST,
    METADATA,
    OPTIMIZER,
    STATE_FILE,
    TOKENIZER,
    WEIGHTS,
    is_step_name,
    manifest_entries,
    saved_step,
    step_of,
)

REQUIRED_FILES = {f"{WEIGHTS}/{METADATA}", f"{OPTIMIZER}/{METADATA}", STATE_FILE, CONFIG_FILE}
HASH_ALL = ("",)
HASH_MODEL = (f"{WEIGHTS}/", STATE_FILE, CONFIG_FILE, TOKENIZER)
"""Prefixes of the files that a model needs: no optimizer, no random state."""
HASH_NONE: tuple[str, ...] = ()


class DamagedCheckpoint(UserError):
    """The files of a checkpoint do not match its manifest."""


def iter_intact(
    folders: Iterable[Path], log: Callable[[str], None], verify: Callable[[Path], Iterable[str]]
) -> Iterator[Path]:
    """The checkpoints without errors, in the given order. Logs why the others are skipped."""
    for folder in folders:
        errors = list(verify(folder))
        if not errors:
            yield folder
        elif folder.is_dir():  # else a running training has deleted it
            log(f"skipping {folder}: {'; '.join(errors)}")


def raise_if_damaged(folder: Path, hashed: tuple[str, ...], check_name: bool = True) -> None:
    """
    Raises:
        DamagedCheckpoint: the checkpoint has errors (see `verify_checkpoint`).
    """
    if errors := list(verify_checkpoint(folder, hashed) if check_name else content_errors(folder, hashed)):
        raise DamagedCheckpoint(f"{folder} is not an intact checkpoint: {'; '.join(errors)}")


def verify_checkpoint(folder: Path, hashed: tuple[str, ...] = HASH_ALL) -> Iterator[str]:
    """What is wrong with a checkpoint's name and files; nothing if it is intact.

    Args:
        hashed: compare the content of files whose names begin with one of these; of all others, only the size.
    """
    yield from name_errors(folder)
    yield from content_errors(folder, hashed)


def name_errors(folder: Path) -> list[str]:
    """What is wrong with a name like step_00000099: a user may have renamed or copied another step's folder."""
    step = saved_step(folder)
    if is_step_name(folder.name) and step not in (step_of(folder), None):
        return [f"its name says step {step_of(folder):,}, but it contains step {step:,}"]
    return []


def content_errors(folder: Path, hashed: tuple[str, ...]) -> Iterator[str]:
    files, errors = _read_manifest(folder)
    yield from errors
    for name, expected in files.items():
        yield from _compare(folder, name, expected, name.startswith(hashed))


def verify_on_all_ranks(folder: Path) -> list[str]:
    """Like `verify_checkpoint`, with the hashing shared between the ranks. Returns the same on all ranks."""
    files, errors = broadcast_object(_read_manifest(folder))
    errors = broadcast_object(name_errors(folder)) + errors
    world_size = len(all_gather_object(None))
    own_files = list(files.items())[group_rank(None) :: world_size]
    own_errors = [error for name, expected in own_files for error in _compare(folder, name, expected)]
    return errors + [error for by_rank in all_gather_object(own_errors) for error in by_rank]


def _read_manifest(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The expected size and hash of each file, and what is wrong with the manifest itself."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest_entries(manifest)
    except FileNotFoundError:
        return {}, [f"it has no {MANIFEST}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return {}, [f"its {MANIFEST} cannot be read ({error})"]
    if manifest.get("format") != FORMAT:
        return {}, [f"its format is {manifest.get('format')!r}, expected {FORMAT!r}"]
    if missing := REQUIRED_FILES - files.keys():
        return {}, [f"its {MANIFEST} does not list {', '.join(sorted(missing))}"]
    return files, []


def _compare(folder: Path, name: str, expected: dict[str, Any], hashed: bool = True) -> Iterator[str]:
    path = folder / name
    try:
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != expected["bytes"]:
            yield f"{name} has {path.stat().st_size:,} bytes, expected {expected['bytes']:,}"
        elif hashed and file_sha256(path) != expected["sha256"]:
            yield f"the content of {name} has changed"
    except OSError as error:
        yield f"{name} cannot be read ({error.strerror})"
