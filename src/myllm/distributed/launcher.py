"""What the launcher (torchrun) tells a process: the only reader of RANK, LOCAL_RANK, WORLD_SIZE and so on.

No torch, which is slow to import: command lines and the processes that tokenize use this too.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from myllm.errors import UserError

from .standard_streams import flush_output

INDEX_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK")
COUNT_VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
UNSET = "unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
RESTART = f"start the processes with torchrun or, for one process, `{UNSET}`"
WAIT_MESSAGE_AFTER_S = 20.0


def is_launched() -> bool:
    """Whether torchrun or a similar launcher started this process."""
    return bool(os.environ.get("RANK") and os.environ.get("LOCAL_RANK"))


def rank() -> int:
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """Among the processes on this machine."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def local_world_size() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or "1") if is_launched() else 1


def world_size() -> int:
    """Processes of the run. Before a launch, WORLD_SIZE may be set to plan for that many.

    Raises:
        UserError: WORLD_SIZE is not a positive number.
    """
    value = os.environ.get("WORLD_SIZE") or "1"
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"WORLD_SIZE is {value!r}, expected a number of processes; unset it to train with one")
    return int(value)


def is_restart() -> bool:
    """Whether this is a later start of the same launch: by torchrun after a crash, or by Slurm after a requeue.

    Not every process of a restarted run knows: a replacement machine counts from 0.
    """
    return any(
        os.environ.get(name, "0") not in ("", "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    )


def store_address() -> tuple[str, int, bool]:
    """Host and port of the store through which the processes find each other, and whether this process hosts it.

    Raises:
        UserError: the launcher sets RANK but no address.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(
            f"RANK is set, but MASTER_ADDR is {host!r} and MASTER_PORT is {port!r}, expected the address of rank 0; "
            f"{RESTART}"
        )
    hosted_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return host, int(port), rank() == 0 and not hosted_by_launcher


def thread_count_variable() -> str | None:
    """The variable by which the user has set the number of CPU threads per process; None if not set.

    torchrun sets OMP_NUM_THREADS to 1 if it starts several processes and finds none. Its own environment tells its
    choice from the user's.
    """
    variable = next((name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)), None)
    if variable == "OMP_NUM_THREADS" and os.environ[variable] == "1" and local_world_size() > 1:
        with suppress(OSError):  # not on Linux: assume that the user set it
            entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
            return variable if any(entry.startswith(b"OMP_NUM_THREADS=") for entry in entries) else None
    return variable


# -- checks -----------------------------------------------------------------------------------------------------------


def check_launcher() -> None:
    """
    Raises:
        UserError: the launcher's variables are invalid or contradict each other.
    """
    if not is_launched():
        _warn_half_launched()
        return
    for name in (*INDEX_VARIABLES, *COUNT_VARIABLES):
        _check_number(name)
    for name, limit in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        value, count = int(os.environ.get(name) or 1), int(os.environ.get(limit) or 0)
        if count and value > count - (name in INDEX_VARIABLES):
            raise UserError(f"{name} is {value}, which does not fit {limit} {count}; {RESTART}")
    if world_size() > 1:
        store_address()


def _check_number(name: str) -> None:
    value = os.environ.get(name) or ("0" if name in INDEX_VARIABLES else "1")
    if not (value.isascii() and value.isdecimal()) or (name in COUNT_VARIABLES and int(value) < 1):
        raise UserError(f"{name} is {value!r}, expected a whole number, as a launcher sets it; {RESTART}")


def _warn_half_launched() -> None:
    """Some schedulers set only part of the variables without torchrun, and then each process trains alone."""
    set_names = [name for name in ("RANK", "LOCAL_RANK") if os.environ.get(name)]
    for name in set_names:
        _check_number(name)
    if set_names and world_size() > 1:
        missing = "LOCAL_RANK" if set_names == ["RANK"] else "RANK"
        print(
            f"warning: {set_names[0]} and WORLD_SIZE are set, but {missing} is not, so this process runs alone; "
            f"{RESTART}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def warn_while_waiting() -> Iterator[None]:
    """Print which processes this one waits for if the `with` block takes long; soon if torchrun did not start it, since
    a scheduler's variables may be left over in a shell, with no other processes."""
    host, port, _ = store_address()
    message = (
        f"rank {rank()} waits for the other {world_size() - 1} of {world_size()} processes at {host}:{port}, for up to "
        f"half an hour. If you started no others, unset the launcher's variables: `{UNSET}`"
    )
    delay_s = 0.5 if "TORCHELASTIC_RUN_ID" not in os.environ and rank() == 0 else WAIT_MESSAGE_AFTER_S
    timer = threading.Timer(delay_s, print, (message,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# -- settings for libraries and torchrun ------------------------------------------------------------------------------


def make_cublas_deterministic() -> None:
    """Have cuBLAS give the same bits every time, by fixing its workspaces. It reads this at its first use, and torch
    refuses matrix products under deterministic algorithms without it.

    Source: cuBLAS's documentation, "Results Reproducibility".
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def use_new_store_each_start() -> None:
    """Have torchrun create a new store at each restart.

    By default torch 2.13 keeps the store with the addresses of dead processes: after a restart gloo's ranks sometimes
    connect to those, and fail or hang (docs/experiments.md).
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


# -- the end of a process ---------------------------------------------------------------------------------------------


def record_exit_code_in(file: Path) -> None:
    """Have this machine's processes write their exit code to a file when they exit with 0 for torchrun."""
    os.environ["MYLLM_EXIT_CODE_FILE"] = str(file)


def exit_with(code: int) -> NoReturn:
    """Exit with the code of a run that was asked to stop.

    torchrun restarts processes that exit with anything but 0. So its processes exit with 0, and leave the code to
    `myllm.distributed.elastic`, which exits with it.
    """
    file = os.environ.get("MYLLM_EXIT_CODE_FILE")
    if is_launched() and file and local_rank() == 0:
        with suppress(OSError):  # a full /tmp must not fail a run that is saved
            Path(file).write_text(str(code), encoding="utf-8")
    raise SystemExit(0 if is_launched() else code)


def exit_failed(code: int) -> NoReturn:
    """Exit a process that failed, after its cleanup.

    One of several skips Python's shutdown: its threads may hold messages of a process group that other ranks still use,
    and would wait for it or abort (https://github.com/pytorch/torchtitan/pull/1342).
    """
    flush_output()  # a failure to print does not change the exit code
    sys.stderr.flush()
    if is_launched():
        os._exit(code)
    raise SystemExit(code)
