"""From the words of a command line to a RunConfig."""

import errno
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from myllm.config import DataConfig, RunConfig, TrainConfig, from_dict, read_config_json
from myllm.distributed import launcher as ranks
from myllm.distributed.standard_streams import flush_output, stdout_closed
from myllm.errors import MachineError, UserError, explain_os_error
from myllm.paths import RunPaths, user_path
from myllm.planning.validation import check_config
from myllm.presets import describe_presets, get_preset

from .parse import parse_arguments, version, wrap_help

RANK_0_FIRST_S = 10
CAUSE_FIRST_S = 3
"""How long a rank that lost another lets that one end first."""
LOST_A_RANK = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "remote process exit")
"""What gloo and NCCL say where the process at the other end is gone."""
NO_COMPILER = re.compile(
    r"(?:No working|Failed to find) (?P<kind>C\+\+|C) compiler(?: found.*\(None, '(?P<tried>[^']*)'\))?"
)
"""What Inductor says for a CPU, and Triton for a GPU."""
USAGE = """usage: python pretrain.py PRESET [--config FILE.json] [--dry-run] [--prepare-only] [--profile] [overrides]

Train a language model. The same command resumes an interrupted run.

presets:
{presets}

options:
  --config FILE.json  lay a saved or hand-written config over the preset (which may then be left out)
  --dry-run           check everything, print the plan (what differs from the preset, memory, time), and stop
  --prepare-only      make the data set if it is not there yet, and stop
  --profile           record a few of the first steps, say where their time goes, and train on (docs/speed.md)
  overrides           any setting of the config, such as --train.max-steps 100 --optim.max-lr 1e-3 --name my-run

`python pretrain.py PRESET --help` lists every setting with its value in that preset.
"""


@dataclass(frozen=True)
class RunArgs:
    """A run as a command line describes it."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]  # no prefix: --train.max-steps
    own_text: tyro.conf.Suppress[bool] = False
    """Whether the text is not the preset's, and nobody said how long to train on it (`plan.with_length`)."""

    @property
    def planning(self) -> bool:
        """Whether the run is not to be started by this process, so that WORLD_SIZE says for how many it is planned."""
        return False


@dataclass(frozen=True)
class PretrainArgs(RunArgs):
    """What pretrain.py is asked."""

    dry_run: bool = False
    """Check everything, print the plan (what differs from the preset, memory, time), and stop."""
    prepare_only: bool = False
    """Make the data set if it is not there yet, and stop."""
    profile: bool = False
    """Record a few of the first steps, say which kernels they spend their time in, and train on."""

    @property
    def planning(self) -> bool:
        return self.dry_run or self.prepare_only


def parse_args(words: list[str]) -> PretrainArgs:
    """The launch that the words of pretrain.py's command line describe; see `parse_as`."""
    return parse_run_args(PretrainArgs, words, USAGE)


def parse_run_args(kind: type[RunArgs], words: list[str], usage: str) -> Any:
    """What the words of a command line ask for, a config and what `kind` has beside it. Checked: the config can be
    trained as far as it tells itself.

    Args:
        usage: "usage: PROGRAM PRESET ...", printed where there are no words; {presets} stands for their list.

    Raises:
        UserError: unknown preset, bad config file, or a config with faults.
        SystemExit: help or the version was asked for, or tyro found a word it does not know (code 2).
    """
    if words[:1] == ["--version"]:
        print(version())
        raise SystemExit(0)
    if not words or words[0] in ("-h", "--help"):
        print(wrap_help(usage.format(presets=describe_presets())))
        # Help that was asked for is a success; a command without a preset is not.
        raise SystemExit(0 if words else 2)
    files, words = read_config_files(words)
    own_text = uses_own_text(files, words)
    base, words = base_config(files, words)
    launch = parse_arguments(
        kind,
        words,
        f"{usage.partition(' PRESET')[0].removeprefix('usage: ')} {base.name}",
        kind(base, own_text),
        "Every setting of the run, with its value in this preset. The same command resumes an interrupted run.",
    )
    # A WORLD_SIZE without torchrun is a plan for later, not the number of processes of this call.
    check_config(launch.config, ranks.world_size() if launch.planning or ranks.is_launched() else 1)
    if RunPaths.of(launch.config.name).checkpoints.is_dir():
        from myllm.runs.saved_settings import keep_saved_settings

        config, own_text = keep_saved_settings(launch.config, launch.own_text)
        launch = replace(launch, config=config, own_text=own_text)
    return launch


ConfigFile = tuple[Path, Any]
"""A config file that the words of a command line name, and what it says."""


def read_config_files(words: list[str]) -> tuple[list[ConfigFile], list[str]]:
    """The config files that the words name, and the words that are left. Each is read here and nowhere else: it may be
    a pipe, as `--config <(jq ...)` is."""
    rest, files = [], []
    remaining = iter(words)
    for word in remaining:
        if word == "--config" or word.startswith("--config="):
            value = word.partition("=")[2] if "=" in word else next(remaining, None)
            if not value:
                raise UserError("--config needs the path of a JSON file")
            path = user_path(value)
            files.append((path, read_config_json(path)))
        else:
            rest.append(word)
    return files, rest


def base_config(files: list[ConfigFile], words: list[str]) -> tuple[RunConfig, list[str]]:
    """The config that overrides start from, and the words that are left: a preset, a file, or a file over a preset."""
    base = RunConfig()
    if words and not words[0].startswith("-"):
        base, words = get_preset(words[0]), words[1:]
    elif not files and not {"-h", "--help"} & set(words):
        raise UserError(f"missing PRESET (or --config FILE.json); presets:\n{wrap_help(describe_presets())}")
    for path, values in files:
        config = from_dict(values, base, path)
        base = from_dict(values, _for_source(base, config.data.source), path)
    return _for_overrides(base, words), words


def _for_overrides(base: RunConfig, words: list[str]) -> RunConfig:
    """The config that these overrides are laid over.

    Raises:
        UserError: two of them say how long to train.
    """
    given = _options(words)
    steps, epochs = "--train.max-steps" in given, given.get("--train.epochs") not in (None, "None")
    if steps and epochs:
        raise UserError("--train.max-steps and --train.epochs both say how long to train; give one of them")
    if steps:
        base = replace(base, train=replace(base.train, epochs=None))
    return _for_source(base, given.get("--data.source", base.data.source))


def _for_source(base: RunConfig, source: str) -> RunConfig:
    """The config for text from a source: how much to take of it, and where it has its text, is said of one source only.

    So a preset on text of one's own asks for the very data set that `myllm data prepare` makes.
    """
    if source == base.data.source:
        return base
    names = ("val_tokens", "target_tokens", "max_documents", "text_column", "shard_tokens")
    return replace(base, data=replace(base.data, **{name: getattr(DataConfig(), name) for name in names}))


def _options(words: list[str]) -> dict[str, str]:
    """Options among the words, as they are spelled in help, with what follows each."""
    found = {}
    for word, following in pairwise([*words, ""]):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found[name.replace("_", "-")] = value if equals else following
    return found


def uses_own_text(files: list[ConfigFile], words: list[str]) -> bool:
    """Whether the words, or a config file, choose other text and say nothing of how long to train on it."""
    given, own_text = _options(words), False
    for file in files:
        own_text = _says(file, own_text)
    if given.keys() & {"--train.max-steps", "--train.epochs"}:
        return False
    return own_text or bool(given.keys() & {"--data.source", "--data.dataset"})


def _says(file: ConfigFile, own_text: bool) -> bool:
    """As `names_own_text`, after one config file more."""
    path, values = file
    found = from_dict(values, RunConfig(data=DataConfig("", ""), train=TrainConfig(max_steps=-1, epochs=-1)), path)
    if found.train.max_steps != -1 or (found.train.epochs or -1) != -1:
        return False
    return own_text or bool(found.data.source or found.data.dataset)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """A user's mistake ends the program with one message, from rank 0, and code 2; a fault keeps its traceback."""
    try:
        _check_system()
        ranks.check_launcher()
    except UserError as error:  # before anything asks which process this is
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error), everywhere=isinstance(error, MachineError))
    except SystemExit as end:
        if isinstance(end.code, int) and end.code:
            ranks.exit_failed(end.code)
        if flush_output():
            ranks.exit_failed(128 + signal.SIGPIPE)
        raise
    except KeyboardInterrupt:
        ranks.exit_failed(130)
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO) and stdout_closed():
            ranks.exit_failed(128 + signal.SIGPIPE)
        if said := explain_os_error(error):
            _fail(said)
        _leave_others(error)
        raise
    except Exception as error:
        if said := _no_compiler(error):
            _fail(said, everywhere=True)
        _leave_others(error)
        raise


def _no_compiler(error: BaseException | None) -> str | None:
    """What to do where torch.compile found no compiler, or one that does not work; None for any other error."""
    while error is not None:
        found = NO_COMPILER.search(str(error))
        if found:
            tried = f" (tried {found['tried']})" if found["tried"] else ""
            return (
                f"torch.compile needs a {found['kind']} compiler that works, and finds none{tried}: install one (g++ "
                "on Linux, `xcode-select --install` on macOS), name yours in the variable CC or CXX, or train without: "
                "--train.compile off"
            )
        error = error.__cause__ or error.__context__
    return None


def _check_system() -> None:
    """
    Raises:
        UserError: a system that is not one of Unix's, and so cannot lock a file as this program does.
    """
    try:
        import fcntl  # noqa: F401
    except ImportError:
        raise UserError(
            f"this Python is for {sys.platform}; MyLLM runs on Linux and macOS, and on Windows in WSL "
            "(https://learn.microsoft.com/windows/wsl/install)"
        ) from None


def _fail(message: str, everywhere: bool = False) -> NoReturn:
    """
    Args:
        everywhere: the first process of every machine says it.
    """
    if ranks.rank() == 0 or (everywhere and ranks.local_rank() == 0):
        print(f"error: {message}", file=sys.stderr)
    else:
        # Rank 0 says it for all, and torchrun then ends the others. One that is still here has a mistake of its own,
        # such as a device that its machine lacks.
        time.sleep(RANK_0_FIRST_S)
        print(f"error on rank {ranks.rank()}, {platform.node()}: {message}", file=sys.stderr)
    ranks.exit_failed(2)


def _leave_others(error: Exception) -> None:
    """End one of several ranks, after a fault of its own or of another; where it is alone, do nothing."""
    if not ranks.is_launched():
        return
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_A_RANK):
        # What went wrong did so elsewhere: a traceback here would only bury it. And a launcher goes by the first rank
        # that ends, which is to be the one that knows; it then ends this one.
        time.sleep(CAUSE_FIRST_S)
        print(
            f"rank {ranks.rank()}: another rank has ended, and says itself why ({str(error).splitlines()[0]}). The "
            "same command goes on from the newest checkpoint",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    ranks.exit_failed(1)
