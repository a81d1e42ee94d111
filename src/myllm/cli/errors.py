"""How commands end after an error: one message, the right exit code, and no noise from other ranks."""

import errno
import platform
import re
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from myllm import paths
from myllm.distributed import launcher as ranks
from myllm.distributed.standard_streams import flush_output, stdout_closed
from myllm.errors import MachineError, PrintedError, UserError, explain_os_error

RANK_0_HEAD_START_S = 10
FIRST_FAILURE_HEAD_START_S = 3
"""How long a rank that lost its connection waits, so that the rank that failed first exits first."""
CONNECTION_LOST = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "remote process exit")
"""Messages of gloo and NCCL after the process at the other end exited."""
NO_COMPILER = re.compile(
    r"(?:No working|Failed to find) (?P<kind>C\+\+|C) compiler(?: found.*\(None, '(?P<tried>[^']*)'\))?"
)
"""Messages of Inductor on a CPU, and of Triton on a GPU."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn a user error into one message from rank 0 and exit code 2. Any other error keeps its traceback."""
    try:
        _check_system()
        ranks.check_launcher()
    except UserError as error:  # the rank of this process is not known
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        yield
        sys.stdout.flush()
    except PrintedError:
        ranks.exit_failed(2)
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
        if message := explain_os_error(error, paths.temp_data()):
            _fail(message)
        _end_rank(error)
        raise
    except Exception as error:
        if message := _explain_missing_compiler(error) or _explain_out_of_memory(error):
            _fail(message, everywhere=True)
        _end_rank(error)
        raise


def _explain_missing_compiler(error: BaseException | None) -> str | None:
    """What to do if torch.compile found no working compiler, or no headers of Python; None for any other error."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    while error is not None:
        found = NO_COMPILER.search(str(error))
        if found:
            tried = f" (tried {found['tried']})" if found["tried"] else ""
            return (
                f"torch.compile needs a working {found['kind']} compiler and found none{tried}: install one (g++ on "
                "Linux, `xcode-select --install` on macOS), set CC or CXX to yours, or train with --train.compile off"
            )
        # Triton's compiler prints what it lacks, and its error has only the command.
        failed_command = isinstance(error, subprocess.CalledProcessError) or "Python.h" in str(error)
        if failed_command and not header.is_file():
            return (
                f"torch.compile needs the headers of Python, and {header} is missing: install them (python3-dev on "
                "Debian and Ubuntu, python3-devel on Fedora), or train with --train.compile off"
            )
        error = error.__cause__ or error.__context__
    return None


def _explain_out_of_memory(error: Exception) -> str | None:
    """What to do if a command other than training ran out of memory; None for any other error."""
    if "torch" not in sys.modules and not isinstance(error, MemoryError):
        return None
    from myllm.distributed.out_of_memory import is_out_of_memory, out_of_memory_reason

    if not is_out_of_memory(error):
        return None
    return (
        f"out of memory: {out_of_memory_reason(error)}; end other programs on this device (nvidia-smi lists them), or "
        "give, where the command has it, a smaller --batch-size, --int8, or --device cpu"
    )


def _check_system() -> None:
    """Raises a UserError if this is not a Unix system, so that files cannot be locked."""
    try:
        import fcntl  # noqa: F401 (only whether it is there)
    except ImportError:
        raise UserError(
            f"this Python is for {sys.platform}; MyLLM runs on Linux and macOS, and on Windows in WSL "
            "(https://learn.microsoft.com/windows/wsl/install)"
        ) from None


def _fail(message: str, everywhere: bool = False) -> NoReturn:
    """Exit with code 2. With `everywhere`, local rank 0 of every machine prints the message."""
    if ranks.rank() == 0 or (everywhere and ranks.local_rank() == 0):
        print(f"error: {message}", file=sys.stderr)
    else:
        # Rank 0 reports an error that all ranks have, and torchrun then ends them. A rank that is still alive has an
        # error of its own, such as a missing device.
        time.sleep(RANK_0_HEAD_START_S)
        print(f"error on rank {ranks.rank()}, {platform.node()}: {message}", file=sys.stderr)
    ranks.exit_failed(2)


def _end_rank(error: Exception) -> None:
    """Exit one of several ranks. Does nothing if this process was not started by a launcher."""
    if not ranks.is_launched():
        return
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in CONNECTION_LOST):
        # A traceback here would hide that of the rank that failed first. The launcher reports the first rank that
        # exits, so wait for that one.
        time.sleep(FIRST_FAILURE_HEAD_START_S)
        print(
            f"rank {ranks.rank()}: another rank failed first; see its error above ({str(error).splitlines()[0]}). Run "
            "the same command to resume from the latest checkpoint",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    ranks.exit_failed(1)
