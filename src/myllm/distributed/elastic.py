"""torchrun with exit codes that can be told apart: `python -m myllm.distributed.elastic ARGUMENTS OF TORCHRUN`.

torchrun itself ends with 1 whatever its processes ended with, and starts them again whatever ended them. Here a process
that was killed or that failed with a traceback (exit code 1) is started again, as often as --max-restarts says. Any
other code was meant: 2 is a user's mistake, others are a stop that was asked for. Nothing is started again then, and
the code is handed on. A signal is handed to the processes, which save, and ends this with 128 and its number, or for
SIGUSR1 and SIGUSR2 with 75, "not finished, start me again".
"""

import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from torch.distributed import DistError, run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from myllm.errors import exit_code

from .launcher import record_exit_code_in, use_new_store_each_start
from .library_env import set_library_env
from .standard_streams import protect_output

DEFAULTS = ["--max-restarts=3", "--shutdown-timeout=120"]
"""Put before what the user gives: how often processes are started again, and how long they have to save when a signal
comes."""
FORWARDED_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
"""The signals that they are told of."""


class Agent(LocalElasticAgent):
    """torchrun's own, but for one decision: after a code that was meant, nothing is started again."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and any(
            is_deliberate(failure.exitcode) for failure in result.failures.values()
        ):
            self._remaining_restarts = 0
        return result


def default_arguments(options: str) -> list[str]:
    """What is put before the user's words, as far as the installed torchrun knows it.

    torch 2.11 has no --shutdown-timeout, so processes have 30 seconds to save there. 2.8 has no --signals-to-handle
    either: what torchrun is not told of ends it, and the processes, which notice, save.

    Args:
        options: what `torchrun --help` prints.
    """
    # What was ignored before stays so: nohup has SIGHUP ignored, so that all of it outlives the terminal.
    told = [name for name in FORWARDED_SIGNALS if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN]
    words = [*DEFAULTS, f"--signals-to-handle={','.join(told)}"]
    return [word for word in words if word.partition("=")[0] in options]


def invalid_arguments(arguments: Any) -> str | None:
    """What is wrong with the processes asked for, or with where they meet, which torchrun would say with a traceback;
    None: nothing."""
    port = arguments.master_port
    if port is not None and not 0 <= port < 2**16:
        return f"--master-port is {port}, expected a port: 0 to {2**16 - 1}"
    try:
        least, most = run.parse_min_max_nnodes(arguments.nnodes)
        if 0 < least <= most and run.determine_local_world_size(arguments.nproc_per_node) > 0:
            return None
        reason = "none could be started"
    except (ValueError, RuntimeError) as error:
        reason = str(error).rstrip(".")
    return (
        f"torchrun cannot start --nnodes {arguments.nnodes} with --nproc-per-node {arguments.nproc_per_node}: {reason}"
        "; expected a number of machines (or MIN:MAX), and of processes on each (or gpu, cpu or auto)"
    )


def is_deliberate(exit_code: int) -> bool:
    """Whether a process chose to end like this; negative codes are signals that killed it."""
    return exit_code > 1


def main(words: list[str]) -> int:
    """Run the processes of this node.

    Returns:
        the exit code.
    """
    set_library_env()
    protect_output(keep_going=True)
    use_new_store_each_start()
    parser = run.get_args_parser()
    arguments: Any = parser.parse_args([*default_arguments(parser.format_help()), *words])
    if fault := invalid_arguments(arguments):
        print(f"error: {fault}", file=sys.stderr)
        return 2
    try:
        with mock.patch.object(api, "LocalElasticAgent", Agent), TemporaryDirectory() as folder:
            due = Path(folder) / "exit_code"
            record_exit_code_in(due)
            run.run(arguments)
            return int(due.read_text(encoding="utf-8")) if due.exists() else 0
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        chosen = next((code for code in codes.values() if is_deliberate(code)), None)
        if chosen is None:
            rank, first = error.get_first_failure()
            how = f"was killed by signal {-first.exitcode}" if first.exitcode < 0 else "failed; see its traceback above"
            print(f"rank {rank} {how}; --max-restarts {arguments.max_restarts} are used up", file=sys.stderr)
        return chosen or 1
    except (DistError, RendezvousError) as error:
        where = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(
            f"error: the machines cannot meet at {where}: {reason}; give a free port, the same on all", file=sys.stderr
        )
        return 1
    except SignalException as signalled:
        return exit_code(signalled.sigval)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
