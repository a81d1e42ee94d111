"""torchrun that preserves exit codes: `python -m myllm.distributed.elastic ARGUMENTS OF TORCHRUN`.

torchrun exits with 1 whatever its processes exit with, and restarts them after any exit. Here, a process that was
killed or failed with a traceback (exit code 1) is restarted up to --max-restarts times. Any other code is deliberate (2
is a user error, others a requested stop): nothing is restarted, and the code becomes this program's. A signal is
forwarded to the processes, which save; then this exits with 128 plus its number, or for SIGUSR1 and SIGUSR2 with 75
("not finished, start again").
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
"""--shutdown-timeout: seconds that processes have to save after a signal."""
FORWARDED_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


class Agent(LocalElasticAgent):
    """torchrun's agent, except that it restarts nothing after a deliberate exit."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        codes = [failure.exitcode for failure in result.failures.values()]
        if result.state == WorkerState.FAILED and any(map(is_deliberate, codes)):
            self._remaining_restarts = 0
        return result


def default_arguments(usage: str) -> list[str]:
    """What is put before the user's arguments, as far as the installed torchrun supports it.

    torch 2.11 has no --shutdown-timeout and gives processes 30 seconds to save.

    Args:
        usage: the output of `torchrun --help`.
    """
    # A signal that is ignored stays ignored: nohup has SIGHUP ignored, so that the run outlives the terminal.
    names = [
        name for name in FORWARDED_SIGNALS if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    ]
    arguments = [*DEFAULTS, f"--signals-to-handle={','.join(names)}"]
    return [argument for argument in arguments if argument.partition("=")[0] in usage]


def invalid_arguments(arguments: Any) -> str | None:
    """What is wrong with the requested processes or their port, for which torchrun would print a traceback; None if
    nothing."""
    port = arguments.master_port
    if port is not None and not 0 <= port < 2**16:
        return f"--master-port is {port}, expected a port: 0 to {2**16 - 1}"
    try:
        least, most = run.parse_min_max_nnodes(arguments.nnodes)
        if 0 < least <= most and run.determine_local_world_size(arguments.nproc_per_node) > 0:
            return None
        reason = "that is no process"
    except (ValueError, RuntimeError) as error:
        reason = str(error).rstrip(".")
    return (
        f"torchrun cannot start --nnodes {arguments.nnodes} with --nproc-per-node {arguments.nproc_per_node}: {reason}"
        "; expected a number of machines (or MIN:MAX), and of processes per machine (or gpu, cpu or auto)"
    )


def is_deliberate(exit_code: int) -> bool:
    """Whether a process chose this exit code. Negative codes are signals that killed it."""
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
    if arguments.standalone and not arguments.local_addr:
        # By default the ranks look for this machine by its name, which may resolve nowhere.
        arguments.local_addr = "127.0.0.1"
    if fault := invalid_arguments(arguments):
        print(f"error: {fault}", file=sys.stderr)
        return 2
    try:
        with mock.patch.object(api, "LocalElasticAgent", Agent), TemporaryDirectory() as folder:
            code_file = Path(folder) / "exit_code"
            record_exit_code_in(code_file)
            run.run(arguments)
            return int(code_file.read_text(encoding="utf-8")) if code_file.exists() else 0
    except ChildFailedError as error:
        return _report_failure(error, arguments.max_restarts)
    except (DistError, RendezvousError) as error:
        address = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(
            f"error: the machines cannot connect at {address}: {reason}; use a free port, the same on all machines",
            file=sys.stderr,
        )
        return 1
    except SignalException as signalled:
        return exit_code(signalled.sigval)


def _report_failure(error: ChildFailedError, max_restarts: int) -> int:
    """Print why the processes failed, unless they chose their exit code, and return that code."""
    codes = [failure.exitcode for _, failure in sorted(error.failures.items())]
    if deliberate := next(filter(is_deliberate, codes), None):
        return deliberate
    rank, first = error.get_first_failure()
    how = f"was killed by signal {-first.exitcode}" if first.exitcode < 0 else "failed; see its traceback above"
    print(f"rank {rank} {how}; --max-restarts {max_restarts} are used up", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
