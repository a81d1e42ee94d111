"""Where files live, and checks of paths that users type. Every path under temp_data/ is defined here.

    temp_data/datasets/<name>-<fingerprint>/       token shards; the fingerprint is a hash of the data settings
    temp_data/listings/                            files of each remote source, as first listed
    temp_data/.locks/                              so that only one process lists or hashes a source
    temp_data/downloads/<source>/                  downloads, until their tokens are on the disk
    temp_data/tokenizers/<source>-<size>/          tokenizers trained here
    temp_data/micro_batches/<run name>.json        micro-batch size that a preflight found for a run
    temp_data/runs/<run name>/                     everything that a run writes
    temp_data/comparisons/<run>+<run>.html         pages of `myllm report A B`
    temp_data/ladder/<name>/                       results of a ladder, whose runs are ordinary runs
    temp_data/tune/<name>/                         results of a search, whose runs are ordinary runs

Set MYLLM_DATA to keep temp_data/ elsewhere, such as on a large scratch disk. If the package was installed from a wheel,
there is no checkout, and temp_data/ is in the current folder.
"""

import errno
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError, warn

REPOSITORY = re.compile(r"(?:hub:)?([\w.-]+/[\w.-]+)(?:@(\S+))?")
"""A model repository on the Hugging Face Hub, with an optional revision."""
NO_MODEL = "nothing at {!r}: give a folder, a pytorch_model.pth, or a Hub repository, namespace/name"


def project_root() -> Path:
    """The checkout that contains this package."""
    return Path(__file__).resolve().parents[2]


def is_checkout() -> bool:
    """False if the package was installed from a wheel, which has no pretrain.py."""
    return (project_root() / "pretrain.py").is_file()


def temp_data() -> Path:
    default = (project_root() if is_checkout() else Path.cwd()) / "temp_data"
    return user_path(os.environ.get("MYLLM_DATA") or default).absolute()


def relative_to_data(path: Path, root: Path | None = None) -> str:
    """A path as configs store it: relative to `root` (default: temp_data/) if below it, so that temp_data/ can move."""
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
    return temp_data() / "micro_batches" / f"{run_name}.json"


def runs_dir() -> Path:
    return temp_data() / "runs"


def comparisons_dir() -> Path:
    return temp_data() / "comparisons"


def ladder_dir(name: str) -> Path:
    return temp_data() / "ladder" / name


def tune_dir(name: str) -> Path:
    return temp_data() / "tune" / name


class _Below:
    """A path below `root`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: "RunPaths", _: object = None) -> Path:
        return run.root / self.name


@dataclass(frozen=True)
class RunPaths:
    """The files of one run."""

    root: Path

    config = _Below("config.json")
    environment = _Below("environment.json")
    metrics = _Below("metrics.jsonl")
    samples = _Below("samples.jsonl")
    log = _Below("log.txt")
    evals = _Below("eval.json")
    """Results of `myllm eval`."""
    checkpoints = _Below("checkpoints")
    best = _Below("best")
    """The checkpoint with the lowest validation loss, if early stopping is on."""
    anomalies = _Below("anomalies")
    """Anomaly dumps: training steps that diverged, each with everything needed to replay it."""
    imported = _Below("imported.json")
    """The origin of the weights, if the run began with imported ones."""
    trial = _Below("trial.json")
    """The config of a run that `myllm tune`, `ladder` or `prove-resume` started: it draws no report at its end."""
    heartbeat = _Below("heartbeat.json")
    stacks = _Below("stacks")
    """Stack traces of all ranks, if one of them stopped responding."""
    profile = _Below("profile")
    """Output of pretrain.py --profile."""
    tensorboard = _Below("tensorboard")
    trackers = _Below("trackers")
    """What each experiment tracker has of the run."""
    plots = _Below("plots")
    report = _Below("report.html")

    @classmethod
    def of(cls, run_name: str) -> "RunPaths":
        return cls(runs_dir() / run_name)


# -- paths that users type --------------------------------------------------------------------------------------------


def user_path(text: str | Path) -> Path:
    """A path as a user types it; "~" is the home folder.

    Raises:
        UserError: the name is too long, or there is no such user.
    """
    shown = f"{str(text)[:60]}..." if len(str(text)) > 100 else str(text)
    try:
        path = Path(text).expanduser()
        path.is_symlink()  # fails if the name is too long
    except RuntimeError as error:  # ~NAME of an unknown user
        raise UserError(f"cannot find {shown!r}: {error}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"cannot read or write {shown!r}: {error.strerror}") from None
    return path


def may_be_model(name: str, hub: bool = True) -> bool:
    """True if a user's argument is a path, the name of a run, or looks like a repository on the Hub.

    Commands check this before they import torch, so that a typo fails at once.
    """
    with suppress(OSError, RuntimeError):  # invalid file names; ~NAME of an unknown user
        if user_path(name).exists() or (runs_dir() / name).exists():
            return True
    return hub and may_be_repository(name)


def may_be_repository(name: str) -> bool:
    """True for NAMESPACE/NAME, but not for RUN/best of a run that has none. An account may have the name of a run."""
    of_run = name.endswith("/best") and (runs_dir() / name).parent.is_dir()
    return REPOSITORY.fullmatch(name) is not None and not of_run


def check_model_path(name: str, hub: bool = True) -> None:
    """Raises a UserError if `name` cannot be a model."""
    if not may_be_model(name, hub):
        raise no_checkpoint_error(name, runs_dir())


def no_checkpoint_error(name: str, runs: Path) -> UserError:
    known = sorted(path.name for path in runs.glob("*") if (path / "checkpoints").is_dir())
    best = f"; {name} is written by a run with train.early_stop_patience" if Path(name).name == "best" else ""
    return UserError(f"no checkpoint at {name!r}{best}; runs with checkpoints: {', '.join(known) or 'none yet'}")


def warn_if_ambiguous(name: str, used: Path, other: Path) -> None:
    """Warn if a user's argument is both a path (`used`) and a name under temp_data/ (`other`)."""
    with suppress(OSError):
        if other.exists() and not other.samefile(used):
            warn(f"using {used.absolute()} for {name}; to use the other one, give {other}")


def unwritable_reason(path: Path) -> str | None:
    """Why a file cannot be written, or None. To be checked before hours of work; missing parent folders are fine."""
    try:
        if path.is_dir():
            return "it is a folder"
        if path.exists() and not os.access(path, os.W_OK):
            return os.strerror(errno.EACCES)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def check_writable(path: Path, option: str) -> None:
    """Raises a UserError if the file that a command-line option names cannot be written."""
    if reason := unwritable_reason(path):
        raise UserError(f"cannot write {path}: {reason}; give another file with {option}")
