"""What a launcher tells a process: the only reader of RANK, LOCAL_RANK, WORLD_SIZE and their like. Knows no torch,
which is slow to import: command lines and the processes that tokenise start with this.
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

PLACES = ("RANK", "LOCAL_RANK", "GROUP_RANK")
COUNTS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
UNSET = "unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
WAITING_SAID_AFTER_S = 20.0


def is_launched() -> bool:
    """Whether torchrun, or what takes its place, started this process."""
    return bool(os.environ.get("RANK") and os.environ.get("LOCAL_RANK"))


def check_launcher() -> None:
    """
    Raises:
        UserError: a launcher's variables that cannot be, or that do not fit one another.
    """
    if not is_launched():
        _check_without_launcher()
        return
    for name in (*PLACES, *COUNTS):
        _check_number(name)
    for place, count in (
        ("RANK", "WORLD_SIZE"),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("LOCAL_WORLD_SIZE", "WORLD_SIZE"),
    ):
        have, most = int(os.environ.get(place) or 1), int(os.environ.get(count) or 0)
        if most and have > most - (place in PLACES):
            raise UserError(f"{place} is {have}, which does not fit {count} {most}; {_start_anew()}")
    if world_size() > 1:
        store_address()


def _check_number(name: str) -> None:
    value = os.environ.get(name) or ("0" if name in PLACES else "1")
    if not (value.isascii() and value.isdecimal()) or (name in COUNTS and int(value) < 1):
        raise UserError(f"{name} is {value!r}, expected a whole number, as a launcher sets it; {_start_anew()}")


def _check_without_launcher() -> None:
    """Some schedulers say which process of how many this is, and start it without torchrun: each would train alone."""
    given = [name for name in ("RANK", "LOCAL_RANK") if os.environ.get(name)]
    for name in given:
        _check_number(name)
    if given and world_size() > 1:
        missing = "LOCAL_RANK" if given == ["RANK"] else "RANK"
        print(
            f"warning: {given[0]} and WORLD_SIZE are set, and {missing} is not: this process works alone, as if none "
            f"of them were; {_start_anew()}",
            file=sys.stderr,
            flush=True,
        )


def _start_anew() -> str:
    return f"start the processes with torchrun or, for one process, `{UNSET}`"


@contextmanager
def warn_while_waiting() -> Iterator[None]:
    """Say whom this process waits for, if the others do not come within the `with` block: at once where it was not
    torchrun that started it. A scheduler's variables may be left over in a shell, and there are no others."""
    host, port, _ = store_address()
    line = (
        f"rank {rank()} waits for the other {world_size() - 1} of {world_size()} processes at {host}:{port}, for up to "
        f"half an hour. If none were started, a launcher's variables are left over: `{UNSET}`"
    )
    soon = 0.5 if "TORCHELASTIC_RUN_ID" not in os.environ and rank() == 0 else WAITING_SAID_AFTER_S
    timer = threading.Timer(soon, print, (line,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def rank() -> int:
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def node_rank() -> int:
    """This machine among those of the run."""
    return int(os.environ.get("GROUP_RANK") or "0") if is_launched() else 0


def is_restart() -> bool:
    """Whether this is another start of the same launch: by torchrun after a process died, or by Slurm after a requeue.

    Not every process of a restarted run need know: a machine that came as a replacement counts from 0.
    """
    return any(
        os.environ.get(name, "0") not in ("", "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    )


def store_address() -> tuple[str, int, bool]:
    """Host and port of the store in which the processes find each other, and whether this process has to open it.

    Raises:
        UserError: a launcher that gives RANK but no address.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(
            f"RANK is set, but MASTER_ADDR is {host!r} and MASTER_PORT is {port!r}, expected where the processes meet; "
            f"{_start_anew()}"
        )
    opened = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by the launcher
    return host, int(port), rank() == 0 and not opened


def make_cublas_deterministic() -> None:
    """Have cuBLAS give the same bits each time, in workspaces of its own choice no more. It asks once, when it is first
    used, and torch refuses products under deterministic algorithms without it.

    Source: cuBLAS's documentation, "Results Reproducibility".
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def use_new_store_each_start() -> None:
    """Have torchrun make the store anew, in which processes find each other, each time it starts them.

    By default torch 2.13 keeps it, and with it the addresses of processes that are dead: after a restart gloo's ranks
    now and then try to reach those, and fail or wait for ever (docs/experiments.md).
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


def record_exit_code_in(file: Path) -> None:
    """Have the processes of this machine write down there the code that is due, where they end with 0 for torchrun."""
    os.environ["MYLLM_EXIT_CODE_FILE"] = str(file)


def exit_with(code: int) -> NoReturn:
    """End with the code of a run that was asked to stop.

    torchrun would start again what ends with anything but 0. So processes that it has started end with 0, and leave the
    code to `myllm.distributed.elastic`, which ends with it.
    """
    file = os.environ.get("MYLLM_EXIT_CODE_FILE")
    if is_launched() and file and local_rank() == 0:
        with suppress(OSError):  # a full /tmp: saved is saved
            Path(file).write_text(str(code), encoding="utf-8")
    raise SystemExit(0 if is_launched() else code)


def exit_failed(code: int) -> NoReturn:
    """End a process that failed, with everything that is to be cleaned up behind it.

    One of several leaves without taking Python and torch apart: their threads may still hold messages of a process
    group that the others are in, and wait for it, or abort (https://github.com/pytorch/torchtitan/pull/1342).
    """
    flush_output()  # nobody to read it is no reason for another code
    sys.stderr.flush()
    if is_launched():
        os._exit(code)
    raise SystemExit(code)


def local_world_size() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or "1") if is_launched() else 1


def thread_count_variable() -> str | None:
    """The variable by which the user has chosen how many CPU threads a process has; None: nobody did.

    torchrun sets OMP_NUM_THREADS to 1 where it starts several processes and finds none. What it was started with tells
    its choice from the user's.
    """
    asked = next((name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)), None)
    if asked == "OMP_NUM_THREADS" and os.environ[asked] == "1" and local_world_size() > 1:
        with suppress(OSError):  # not on Linux: it is taken for the user's
            given = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
            return asked if any(each.startswith(b"OMP_NUM_THREADS=") for each in given) else None
    return asked


def world_size() -> int:
    """Processes of the run; before it is launched, WORLD_SIZE says for how many it is being planned.

    Raises:
        UserError: WORLD_SIZE is no number of processes.
    """
    value = os.environ.get("WORLD_SIZE") or "1"
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"WORLD_SIZE is {value!r}, expected a number of processes; unset it to train with one")
    return int(value)
