"""Runs of pretrain.py on two ranks, one after another, in forks of a process that has imported everything already.

Reads one request a line, {"words": [...], "data": temp_data, "out": file, "fault": {name: value}, "on": [ranks], "all":
bool}, and answers each with an exit code, negative for a signal. A fork takes a tenth of what a new interpreter with
torch does, and dies as truly. The faults are put into the forks alone: production knows nothing of them.

As torchrun does, it tells the other rank to end once one has failed, or kills it with the first if "all" is said. As
`myllm.distributed.elastic` it answers with the code of the first that failed, or the one that a requested stop leaves.
"""

import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
TO_END_S, TO_FOLLOW_S = 20.0, 2.0
"""How long a rank that is told to end may take; torchrun waits 30 s. Where the fault is a death, nothing that the other
rank still does counts. One that hangs takes all of it."""
EARLY = (
    "pretrain",
    "myllm.training.loop",
    "myllm.data.prepare.background",
    "myllm.cli.launch",
    "myllm.hub.background_publish",
    "myllm.runs.report.html",
)
EARLY += ("torch._dynamo",)  # every optimizer imports it: two thirds of a small run's time
BOUNDARIES = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")
"""Calls of the system between which a save can be cut in two."""


def die_before(number: int, events: str) -> None:
    """SIGKILL before the call of this number among those of this rank that touch checkpoints, counted from the first
    step on. Each is noted first."""
    from myllm.training import loop as train

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
    from myllm.training import loop as train

    real = train.run_eval

    def run_eval(evaluation: Any, ctx: Any, state: Any, *others: Any) -> Any:
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(evaluation, ctx, state, *others)

    train.run_eval = run_eval


def poison(step: int) -> None:
    """One NaN in what the layers are given, in the first batch of a step, as from a bad memory cell."""
    from myllm.training import loop as train

    real = train.train_step

    def train_step(trainer: Any, number: int, *phase: Any) -> Any:
        def spoil(module: Any, given: Any, output: Any) -> Any:
            hook.remove()
            output = output.clone()
            output[0, 0, 0] = float("nan")
            return output

        if number == step - 1:
            (embedding,) = (
                module for name, module in trainer.train_model.named_modules() if name.endswith("embedding")
            )
            hook = embedding.register_forward_hook(spoil)
        return real(trainer, number, *phase)

    train.train_step = train_step


def sleep_before(step: int) -> None:
    """Never take a step."""
    from myllm.training import loop as train

    real = train.train_step

    def train_step(trainer: Any, number: int, *phase: Any) -> Any:
        if number == step - 1:
            time.sleep(600)
        return real(trainer, number, *phase)

    train.train_step = train_step


def interrupt_twice_in_save(step: int) -> None:
    """Ctrl-C and, a moment later, Ctrl-C again, while the disk takes for ever over a save. And again: the system makes
    one of two that come before the main thread has its turn."""
    real = os.fsync

    def fsync(file: int) -> None:
        if f"step_{step:08d}" in os.readlink(f"/proc/self/fd/{file}"):
            for _ in range(600):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        real(file)

    os.fsync = fsync


def turn_back_the_clock(seconds: float) -> None:
    """The time of day jumps back at every tenth look."""
    real, looks = time.time, count()
    time.time = lambda: real() - seconds * (next(looks) // 10)
    strftime, localtime = time.strftime, time.localtime
    time.strftime = lambda form, when=None: strftime(form, when or localtime(time.time()))


def lose_root(user: int) -> None:
    """Rights bind everybody but root: root becomes another user, and does so as the run's folder is claimed, since what
    Python still imports may be root's."""
    from myllm.training import services

    real = services.claim_run

    def claim_run(run: Any) -> Any:
        if os.getuid() == 0:
            os.seteuid(user)
        return real(run)

    services.claim_run = claim_run


def limit_files(size_bytes: int) -> None:
    """A file may not grow beyond this: the write fails half way, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


FAULTS = {
    "die_before": die_before,
    "stop_in_evaluation": stop_in_evaluation,
    "interrupts": interrupt_twice_in_save,
    "nan": poison,
    "sleep": sleep_before,
    "clock": turn_back_the_clock,
    "user": lose_root,
    "file_size": limit_files,
}


def run(request: dict[str, Any], rank: int, port: int) -> None:
    out = os.open(request["out"], os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"MYLLM_DATA": request["data"], "MYLLM_EXIT_CODE_FILE": request["out"] + ".code"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["pretrain.py", *request["words"]]
    import pretrain
    from myllm.runs.report import html as report

    report.write_report = lambda run: None  # takes longer than all else, and has its own tests
    for name, value in request["fault"].items() if rank in request["on"] else ():
        FAULTS[name](**value) if isinstance(value, dict) else FAULTS[name](value)
    pretrain.main()


def fork(request: dict[str, Any], rank: int, port: int) -> int:
    """Start a rank; its process."""
    child = os.fork()
    if child:
        return child
    from support.exit_codes import exit_code  # the path is not set when this file is read

    code = exit_code(lambda: run(request, rank, port), crashed=70)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_all(children: set[int], patience_s: float) -> int:
    """The code of the first rank that fails, or 0. The others are told to end then, and have so long for it."""
    first, deadline = 0, float("inf")
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            children.remove(child)
        code = os.waitstatus_to_exitcode(status) if child else 0
        if code and not first:
            first, deadline = code, time.monotonic() + patience_s
            for process_id in children if patience_s else ():
                os.kill(process_id, signal.SIGTERM)
        if time.monotonic() >= deadline:
            for process_id in children:
                os.kill(process_id, signal.SIGKILL)
        time.sleep(0.01)
    return first


def answer(request: dict[str, Any]) -> int:
    from support.ports import unused_port

    port = unused_port()
    due = Path(request["out"] + ".code")
    due.unlink(missing_ok=True)
    Path(request["out"]).write_text("")
    children = {fork(request, rank, port) for rank in range(RANKS)}
    patience_s = TO_FOLLOW_S if "die_before" in request["fault"] else TO_END_S
    code = wait_for_all(children, 0 if request["all"] else patience_s)
    return int(due.read_text()) if not code and due.exists() else code


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]
    for name in EARLY:
        import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
