"""Runs of pretrain.py, one after another, each in a fork of a process that has imported everything already.

Reads one request a line, {"words": [...], "data": temp_data, "out": file, "fault": {name: value}}, and answers each
with the exit code, negative for a signal. A fork takes a tenth of what a new interpreter with torch does, and dies as
truly. The faults are put into the fork alone: production knows nothing of them.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EARLY = ("pretrain", "myllm.train", "myllm.data.beside", "myllm.launch", "myllm.publish_beside", "myllm.report")
EARLY += ("torch._dynamo",)  # every optimizer imports it: two thirds of a small run's time
BOUNDARIES = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")
"""Calls of the system between which a save can be cut in two."""


def die_before(number: int, events: str) -> None:
    """SIGKILL before the call of this number among those that touch checkpoints, counted from the first step on. Each
    is noted first."""
    from myllm import train

    seen, started, real_step = 0, False, train.train_step

    def train_step(*arguments: Any) -> Any:
        nonlocal started
        started = True
        return real_step(*arguments)

    train.train_step = train_step

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            where = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else os.fspath(arguments[0])
            within = options.get("dir_fd")
            if within is not None:
                where = os.path.join(os.readlink(f"/proc/self/fd/{within}"), where)
            if started and "/checkpoints" in where:
                seen += 1
                with open(events, "a") as file:
                    file.write(f"{name} {where}\n")
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in BOUNDARIES:
        setattr(os, name, counted(name, getattr(os, name)))


def stop_in_evaluation(step: int) -> None:
    """SIGTERM right before the first evaluation at a step."""
    from myllm import train

    real = train.run_eval

    def run_eval(planned: Any, state: Any, *others: Any) -> Any:
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(planned, state, *others)

    train.run_eval = run_eval


def turn_back_the_clock(seconds: float) -> None:
    """The time of day jumps back at every tenth look."""
    real, looks = time.time, iter(range(10**9))
    time.time = lambda: real() - seconds * (next(looks) // 10)
    strftime, localtime = time.strftime, time.localtime
    time.strftime = lambda form, when=None: strftime(form, when or localtime(time.time()))


def become(user: int) -> None:
    """Another user from the moment on that the run's folder is claimed: what Python still imports may be root's."""
    from myllm import train

    real = train.claimed

    def claimed(run: Any) -> Any:
        os.seteuid(user)
        return real(run)

    train.claimed = claimed


def limit_files(size_bytes: int) -> None:
    """A file may not grow beyond this: the write fails half way, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


FAULTS = {"die_before": die_before, "stop_in_evaluation": stop_in_evaluation, "clock": turn_back_the_clock}
FAULTS |= {"user": become, "file_size": limit_files}


def run(request: dict[str, Any]) -> None:
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ["MYLLM_DATA"] = request["data"]
    sys.argv = ["pretrain.py", *request["words"]]
    import pretrain
    from myllm import report

    report.write_report = lambda run: None  # takes longer than all else, and has its own tests
    for name, value in request.get("fault", {}).items():
        FAULTS[name](**value) if isinstance(value, dict) else FAULTS[name](value)
    pretrain.main()


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    for name in EARLY:
        import_module(name)

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                run(json.loads(line))
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
