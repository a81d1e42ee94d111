"""Where things live. Every path under temp_data/ is made here, and nowhere else.

    temp_data/datasets/<name>-<fingerprint>/       token shards, keyed by what made them
    temp_data/listings/                            which files remote sources have, as first seen
    temp_data/.locks/                              one process asks or hashes, the others wait for its answer
    temp_data/downloads/<source>/                  files of remote sources, until their tokens are safe
    temp_data/tokenizers/<source>-<size>/          vocabularies of one's own
    temp_data/micro_batches/<run name>.json        the micro-batch size that a preflight found for a run to come
    temp_data/runs/<run name>/                     everything one training run leaves behind

Set MYLLM_DATA to keep temp_data/ elsewhere, such as a large scratch disk. A package that was installed from a wheel has
no checkout around it: temp_data/ is then in the current folder.
"""

import errno
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError, warn

REPOSITORY = re.compile(r"(?:hub:)?([\w.-]+/[\w.-]+)(?:@(\S+))?")
"""A model's repository of the Hub, and its revision."""
NO_MODEL = "nothing at {!r}: give a folder, a pytorch_model.pth, or a repository of the Hub, namespace/name"


def user_path(text: str | Path) -> Path:
    """A path as a user gives it: "~" is a home folder, and the name is one that a file can have.

    Raises:
        UserError: it is none.
    """
    shown = f"{str(text)[:60]}..." if len(str(text)) > 100 else str(text)
    try:
        path = Path(text).expanduser()
        path.is_symlink()  # asks for it by name, and so refuses one that is too long
    except RuntimeError as error:  # ~NAME of nobody
        raise UserError(f"cannot find {shown!r}: {error}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"cannot read or write {shown!r}: {error.strerror}") from None
    return path


def project_root() -> Path:
    """The checkout that holds this package."""
    return Path(__file__).resolve().parents[2]


def is_checkout() -> bool:
    """False if the package was installed from a wheel: there is no pretrain.py then."""
    return (project_root() / "pretrain.py").is_file()


def temp_data() -> Path:
    default = (project_root() if is_checkout() else Path.cwd()) / "temp_data"
    return user_path(os.environ.get("MYLLM_DATA") or default).absolute()


def relative_to_data(path: Path, root: Path | None = None) -> str:
    """How a config names a path: relative to `root` (temp_data/) if it is below, so that the whole may be moved."""
    path, root = path.absolute(), root or temp_data()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def datasets_dir() -> Path:
    return temp_data() / "datasets"


def listings_dir() -> Path:
    return temp_data() / "listings"


def locks_dir() -> Path:
    return temp_data() / ".locks"


def downloads_dir() -> Path:
    return temp_data() / "downloads"


def tokenizers_dir() -> Path:
    return temp_data() / "tokenizers"


def micro_batch_file(run_name: str) -> Path:
    """Where a preflight leaves the micro-batch size that it found for a run."""
    return temp_data() / "micro_batches" / f"{run_name}.json"


def runs_dir() -> Path:
    return temp_data() / "runs"


@dataclass(frozen=True)
class RunPaths:
    """The files of one run, by name."""

    root: Path

    @classmethod
    def of(cls, run_name: str) -> "RunPaths":
        return cls(runs_dir() / run_name)

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def best(self) -> Path:
        """Holds the checkpoint with the lowest validation loss, where early stopping is on."""
        return self.root / "best"

    @property
    def anomalies(self) -> Path:
        """Anomaly dumps: training steps that diverged, each with everything needed to replay it."""
        return self.root / "anomalies"

    @property
    def imported(self) -> Path:
        """Where the weights came from, in a run that began with others'."""
        return self.root / "imported.json"

    @property
    def heartbeat(self) -> Path:
        """What it is doing right now."""
        return self.root / "heartbeat.json"

    @property
    def stacks(self) -> Path:
        """Where each rank stood when they waited for one in vain."""
        return self.root / "stacks"

    @property
    def profile(self) -> Path:
        """What pretrain.py --profile found."""
        return self.root / "profile"

    @property
    def published(self) -> Path:
        return self.root / "published.json"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


def may_be_model(where: str, hub: bool = True) -> bool:
    """Whether a user's word for a model or a run can mean anything: a path, a run, or a repository of the Hub.

    Commands ask this before they load torch, so that a typo is answered at once.
    """
    with suppress(OSError, RuntimeError):  # a name that no disk takes; ~NAME of nobody
        if user_path(where).exists() or (runs_dir() / where).exists():
            return True
    return hub and REPOSITORY.fullmatch(where) is not None


def warn_if_ambiguous(where: str, taken: Path, named: Path) -> None:
    """Say which was taken where a user's word is a path from here and a name under temp_data/ too.

    Args:
        taken: what was taken.
        named: what the name under temp_data/ would be.
    """
    with suppress(OSError):
        if named.exists() and not named.samefile(taken):
            warn(f"{where} is {taken.absolute()} here, and that is taken; for the other one give {named}")


def check_model_path(where: str, hub: bool = True) -> None:
    """
    Raises:
        UserError: `where` leads nowhere.
    """
    if not may_be_model(where, hub):
        raise no_checkpoint_error(where, runs_dir())


def no_checkpoint_error(where: str, runs: Path) -> UserError:
    """What to say where a user's word leads to no checkpoint."""
    known = sorted(path.name for path in runs.glob("*") if (path / "checkpoints").is_dir())
    return UserError(f"no checkpoint at {where!r}; runs with checkpoints: {', '.join(known) or 'none yet'}")
