"""Whether a checkpoint is what was saved: by its manifest, its name, and the content or the sizes of its files."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from myllm.distributed import collectives as distributed
from myllm.errors import UserError
from myllm.files import file_sha256, read_json

from .dcp import METADATA
from .retention import MANIFEST, is_step_name, saved_step, step_of

FORMAT = "myllm-checkpoint-2"
TOKENIZER = "tokenizer.json"
WEIGHTS, OPTIMIZER, RANDOM = "weights", "optimizer", "random"
FILES = {f"{WEIGHTS}/{METADATA}", f"{OPTIMIZER}/{METADATA}", "state.json", "config.json"}
HASH_ALL = ("",)
HASH_MODEL = (f"{WEIGHTS}/", "state.json", "config.json", TOKENIZER)
"""Beginnings of the names of the files that a model is made of: neither the optimizer nor random state."""
HASH_NONE: tuple[str, ...] = ()


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not what its manifest says."""


def iter_intact(
    folders: Iterable[Path], say: Callable[[str], None], verify: Callable[[Path], Iterable[str]]
) -> Iterator[Path]:
    """Those of some checkpoints that have no faults, in the order given; says which were passed over, and why."""
    for folder in folders:
        if (faults := list(verify(folder))) and folder.is_dir():  # else training has removed it meanwhile
            say(f"passing over {folder}: {'; '.join(faults)}")
        if not faults:
            yield folder


def raise_if_damaged(folder: Path, hashed: tuple[str, ...]) -> None:
    """
    Raises:
        Damaged: `verify` finds a fault.
    """
    if faults := list(verify_checkpoint(folder, hashed)):
        raise DamagedCheckpoint(f"{folder} is not an intact checkpoint: {'; '.join(faults)}")


def verify_checkpoint(folder: Path, hashed: tuple[str, ...] = HASH_ALL) -> Iterator[str]:
    """What is wrong with a checkpoint's name and files; nothing if it is intact.

    Args:
        hashed: beginnings of the names of the files to compare by content; of the others, only the size is.
    """
    yield from name_faults(folder)
    yield from content_faults(folder, hashed)


def name_faults(folder: Path) -> list[str]:
    """What is wrong with a name such as step_00000099: somebody renamed or copied another step's folder."""
    step = saved_step(folder)
    if is_step_name(folder.name) and step not in (step_of(folder), None):
        return [f"its name says step {step_of(folder):,}, but what it holds is step {step:,}"]
    return []


def content_faults(folder: Path, hashed: tuple[str, ...]) -> Iterator[str]:
    files, faults = _read_manifest(folder)
    yield from faults
    for name, expected in files.items():
        yield from _compare(folder, name, expected, name.startswith(hashed))


def verify_on_all_ranks(folder: Path) -> list[str]:
    """As `verify`, with the hashing shared over all ranks."""
    files, faults = distributed.broadcast_object(_read_manifest(folder))
    faults = distributed.broadcast_object(name_faults(folder)) + faults
    by_rank = distributed.all_gather_object(None)
    mine = list(files.items())[distributed.group_rank(None) :: len(by_rank)]
    found = [fault for name, expected in mine for fault in _compare(folder, name, expected)]
    return faults + [fault for one in distributed.all_gather_object(found) for fault in one]


def _read_manifest(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What each file should be, and what is wrong with the manifest itself."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = {name: {"bytes": int(of["bytes"]), "sha256": of["sha256"]} for name, of in manifest["files"].items()}
    except FileNotFoundError:
        return {}, [f"it has no {MANIFEST}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return {}, [f"its {MANIFEST} cannot be read ({error})"]
    if manifest.get("format") == "myllm-checkpoint-1":
        return {}, ["it was written by an older version of this code, which alone can read it"]
    if manifest.get("format") != FORMAT:
        return {}, [f"its format is {manifest.get('format')!r}, expected {FORMAT!r}"]
    if missing := FILES - files.keys():
        return {}, [f"its {MANIFEST} does not name {', '.join(sorted(missing))}"]
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
