"""Exceptions and exit codes that several packages share."""

import os
import signal
import sys

EXIT_UNFINISHED = os.EX_TEMPFAIL  # 75
"""Exit code of a run that is to be started again."""
TIME_LIMIT = int(signal.SIGALRM)
"""Stands for train.max_wall_s among the signal numbers. No such signal is sent."""
TIME_LIMIT_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals by which schedulers say that the time is up."""


class UserError(ValueError):
    """Input that cannot work: says what was seen, what was expected, and what to do.

    Entry points print the message without a traceback and exit with code 2. Anything else that is
    raised is a fault of this project and keeps its traceback.
    """


class MachineError(UserError):
    """A UserError that the run's other machines may not share, such as a damaged file: each machine says its own."""


class TrainingDiverged(RuntimeError):
    """A gradient or weight is not finite, or too many updates in a row were skipped."""

    EXIT_CODE = 65
    """sysexits.h's EX_DATAERR. Not 1, a crash that another try may get past, nor 2, a mistake of the user's."""


def exit_code(stopped_by: int) -> int:
    """Exit code of a run that a signal (or TIME_LIMIT) stopped."""
    return EXIT_UNFINISHED if stopped_by in (TIME_LIMIT, *TIME_LIMIT_SIGNALS) else 128 + stopped_by


def did_you_mean(word: str, known: list[str]) -> str:
    """`", did you mean 'x'?"` for the closest known word, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def warn(line: str) -> None:
    """Say something beside a command's output."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
