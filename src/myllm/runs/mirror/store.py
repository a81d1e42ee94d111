"""The copy of one run at a URL, through fsspec.

    URL/RUN_NAME/checkpoints/step_00000100/   as on the disk; manifest.json is written last
    URL/RUN_NAME/best/step_00000040/          the same, with early stopping
    URL/RUN_NAME/metrics.jsonl ...            the run's small files, as of the newest checkpoint or later

A checkpoint is whole if it has a manifest and every file in it has the manifest's size. Nothing else is ever taken for
one. Its content is compared when it is fetched.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from myllm.checkpoint.layout import MANIFEST, is_step_name, manifest_entries, step_dir_name, step_of
from myllm.errors import UserError
from myllm.files import file_sha256, read_json
from myllm.paths import RunPaths, runs_dir

RUN_FILES = (
    "config.json", "environment.json", "imported.json", "metrics.jsonl", "samples.jsonl", "log.txt", "eval.json",
    "report.html",
)  # fmt: skip
"""What a resume and a report need beside a checkpoint."""
GROWING = ("metrics.jsonl", "samples.jsonl", "log.txt")
"""Those that only grow: of two copies, the longer one is newer."""
PROBE = ".writable"
NO_MANIFEST = (UserError, ValueError, KeyError, TypeError, AttributeError, OverflowError)
"""What reading something else as a manifest raises."""


class LocalDamage(Exception):
    """A checkpoint on the disk does not match its own manifest, so it is not copied."""


class MirrorStore:
    """URL/RUN_NAME. Methods raise what the file system raises: any exception, OSError for most."""

    def __init__(self, url: str, run: RunPaths) -> None:
        """
        Raises:
            UserError: no file system for such a URL, its package is missing, or the folder does not exist.
        """
        self._fs, base, self._local = _open(url)
        self.url = f"{url.rstrip('/')}/{run.root.name}"
        self._root = f"{base.rstrip('/')}/{run.root.name}"
        self._run = run

    def is_empty(self) -> bool:
        return not self._sizes()

    def check_writable(self) -> None:
        self._write(PROBE, b"")
        self._fs.rm_file(f"{self._root}/{PROBE}")

    def checkpoints(self, kind: str) -> dict[int, dict[str, Any] | None]:
        """The manifests of all checkpoints, newest first; None for one that is not whole.

        Args:
            kind: "checkpoints" or "best".
        """
        sizes: dict[int, dict[str, int]] = {}
        for path, size in self._sizes(kind).items():
            folder, _, name = path.partition("/")
            if is_step_name(folder) and folder == step_dir_name(step_of(Path(folder))):
                sizes.setdefault(step_of(Path(folder)), {})[name] = size
        return {step: self._whole(kind, step, sizes[step]) for step in sorted(sizes, reverse=True)}

    def upload(self, kind: str, folder: Path) -> int:
        """Copy a checkpoint, its manifest last, after the run's small files. Returns the bytes of its files.

        Raises:
            LocalDamage: a file is not as the manifest says.
        """
        remote, entries = f"{kind}/{folder.name}", manifest_entries(local_manifest(folder))
        if self._fs.exists(f"{self._root}/{remote}/{MANIFEST}"):
            self._fs.rm_file(f"{self._root}/{remote}/{MANIFEST}")  # not whole while its files are replaced
        for name, entry in entries.items():
            if not (folder / name).is_file() or file_sha256(folder / name) != entry["sha256"]:
                raise LocalDamage(f"{name} is missing or has changed")
            self._fs.put_file(str(folder / name), f"{self._root}/{remote}/{name}")
        if problem := _size_error(entries, self._sizes(remote)):
            raise OSError(f"after the upload, {problem}")
        self.upload_run_files()
        self._write(f"{remote}/{MANIFEST}", (folder / MANIFEST).read_bytes())
        return sum(entry["bytes"] for entry in entries.values())

    def upload_run_files(self) -> None:
        for name in RUN_FILES:
            if (self._run.root / name).is_file():
                self._write(name, (self._run.root / name).read_bytes())

    def fetch(self, kind: str, step: int, manifest: dict[str, Any], to: Path) -> None:
        """Copy a whole checkpoint to a folder. The caller verifies it."""
        remote = f"{self._root}/{kind}/{step_dir_name(step)}"
        for name in (*manifest_entries(manifest), MANIFEST):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(f"{remote}/{name}", str(to / name))

    def fetch_run_files(self) -> None:
        """Copy the run's small files to its folder, except those that have grown there since."""
        for name, size in self._sizes(maxdepth=1).items():
            local = self._run.root / name
            if name in RUN_FILES and not (name in GROWING and local.is_file() and local.stat().st_size >= size):
                self._fs.get_file(f"{self._root}/{name}", str(local))

    def remove(self, kind: str, step: int) -> None:
        """Remove a checkpoint, its manifest first."""
        remote = f"{kind}/{step_dir_name(step)}"
        for name in sorted(self._sizes(remote), key=lambda name: name != MANIFEST):
            self._fs.rm_file(f"{self._root}/{remote}/{name}")
        if self._local:
            shutil.rmtree(f"{self._root}/{remote}", ignore_errors=True)

    def _whole(self, kind: str, step: int, sizes: Mapping[str, int]) -> dict[str, Any] | None:
        if MANIFEST not in sizes:
            return None
        content = self._fs.cat_file(f"{self._root}/{kind}/{step_dir_name(step)}/{MANIFEST}")
        try:
            manifest = json.loads(content)
            entries = manifest_entries(manifest)
        except NO_MANIFEST:
            return None  # cut short
        inside = not any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in entries)
        return manifest if inside and _size_error(entries, sizes) is None else None

    def _sizes(self, folder: str = "", maxdepth: int | None = None) -> dict[str, int]:
        """The size of each file below a folder, by its path in it."""
        root = f"{self._root}/{folder}".rstrip("/")
        self._fs.invalidate_cache()
        found = self._fs.find(root, maxdepth=maxdepth, detail=True)
        return {path.removeprefix(root).lstrip("/"): int(info["size"] or 0) for path, info in found.items()}

    def _write(self, name: str, content: bytes) -> None:
        """Replace a small file at once. Object stores do; on a disk it gets its name last."""
        path = f"{self._root}/{name}"
        self._fs.pipe_file(f"{path}.partial" if self._local else path, content)
        if self._local:
            self._fs.mv(f"{path}.partial", path)


def local_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        LocalDamage: a checkpoint on the disk has no valid manifest.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        manifest_entries(manifest)
    except (OSError, *NO_MANIFEST) as error:
        raise LocalDamage(f"its {MANIFEST} cannot be read ({error})") from None
    return manifest


def _size_error(entries: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> str | None:
    for name, entry in entries.items():
        if sizes.get(name) != entry["bytes"]:
            found = f"{sizes[name]:,}" if name in sizes else "no"
            return f"{name} has {found} bytes, expected {entry['bytes']:,}"
    return None


def _open(url: str) -> tuple[Any, str, bool]:
    """The file system of a URL, the path of the URL in it, and whether it is this machine's disk."""
    import fsspec  # only where a mirror is used

    if not url.strip():
        raise UserError("checkpoint.mirror is empty, expected s3://, gs://, hf:// or the path of a folder")
    protocol = url.partition("://")[0] if "://" in url else "file"
    options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
    try:
        fs, base = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        raise UserError(
            f"checkpoint.mirror {url} needs another package ({error}); for s3:// and gs://: pip install -e '.[mirror]'"
        ) from None
    except ValueError as error:
        raise UserError(
            f"checkpoint.mirror {url}: {error}; expected s3://, gs://, hf:// or the path of a folder"
        ) from None
    if options:
        if not Path(base).is_dir():
            raise UserError(f"checkpoint.mirror {url}: {base} is not a folder; create it (is the disk mounted?)")
        if Path(base).resolve() == runs_dir().resolve():
            raise UserError(f"checkpoint.mirror {url} is the folder of the runs themselves; expected another one")
    return fs, base, bool(options)


def describe(error: Exception) -> str:
    """An error of a file system in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no message'}"
