"""`python -m myllm` and pretrain.py in processes that start at once.

Importing torch and the commands takes a process 2 to 4 s. Here one process of each test worker has imported them, and
forks for every call: the fork has its own memory, environment, folder and streams, runs the same entry point as
`__main__`, and ends as any interpreter does. What a process does before its imports is not tested this way; a call
whose environment a library may have read on import gets an interpreter of its own.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATH = (ROOT, ROOT / "src", ROOT / "tests")
IMPORTED = (
    "torch._dynamo",  # every optimizer imports it
    "pretrain",
    "myllm.cli.main",
    "myllm.cli.launch",
    "myllm.cli.trials",
    "myllm.data.prepare.background",
    "myllm.runs.report.html",
    "myllm.training.loop",
)
ENVIRONMENT = dict(os.environ)
"""That of a worker, not of a test: tests import this module as they are collected."""
MAY_DIFFER = {"MYLLM_DATA", "PYTEST_CURRENT_TEST", "COLUMNS", "LINES", "MPLBACKEND", "PYTORCH_ALLOC_CONF"}
MAY_DIFFER |= {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "HF_XET_HIGH_PERFORMANCE"}
"""Variables that nothing reads on import, those that every command sets for itself, and those that scikit-learn (for
another OpenMP than torch's) and lm_eval set in each process that imports them, as pytest's does."""


def run(
    *words: str | Path, ranks: int | None = None, env: dict[str, str] | None = None, cwd: str | Path | None = None,
    stdin: str = "", timeout: float = 240, report: bool = False,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """As `subprocess.run` of this Python with these words and captured text.

    Args:
        words: `-m myllm ...` or `.../pretrain.py ...`.
        ranks: processes with the variables that torchrun gives its ranks. Once one fails the others are told to end.
            None: one process without them.
        report: let pretrain.py draw one. It takes longer than all else in a tiny run, and has its own tests.
    """
    words = tuple(map(str, words))
    env = dict(os.environ if env is None else env)
    if {key for key, _ in env.items() ^ ENVIRONMENT.items()} - MAY_DIFFER:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        env["PYTHONPATH"] = os.pathsep.join(map(str, PATH))
        return subprocess.run(
            [sys.executable, *torchrun, *words], env=env, cwd=cwd, input=stdin, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
    request = {"words": words, "ranks": ranks, "env": env, "cwd": str(cwd or os.getcwd()), "timeout": timeout}
    request["report"] = report
    return _warm_process().run(request, stdin)


class WarmProcess:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self._process.communicate)

    def run(self, request: dict[str, Any], stdin: str) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory(prefix="warm-start-") as folder:
            streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
            for stream, text in zip(streams, (stdin, "", ""), strict=True):
                stream.write_text(text, encoding="utf-8")
            print(json.dumps(request | {"streams": list(map(str, streams))}), file=self._process.stdin, flush=True)
            code = json.loads(self._process.stdout.readline())
            out, err = (stream.read_text(encoding="utf-8") for stream in streams[1:])
        command = [sys.executable, *request["words"]]
        if code is None:
            raise subprocess.TimeoutExpired(command, request["timeout"], out, err)
        return subprocess.CompletedProcess(command, code, out, err)


@cache
def _warm_process() -> WarmProcess:
    return WarmProcess()


# -- in the warm process ----------------------------------------------------------------------------------------------


def serve() -> dict[str, Any] | None:
    """Fork for each request. Returns it in the fork, and None in the warm process once there are no more."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        request, children = json.loads(line), set()
        for variables in _variables_of_ranks(request["ranks"]):
            if (child := os.fork()) == 0:
                requests.close()
                answers.close()
                return request | {"env": request["env"] | variables}
            children.add(child)
        print(json.dumps(_wait(children, time.monotonic() + request["timeout"])), file=answers, flush=True)
    return None


def _variables_of_ranks(ranks: int | None) -> list[dict[str, str]]:
    if ranks is None:
        return [{}]
    from support.ports import unused_port  # the path is not set when this file is read

    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port())}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _wait(children: set[int], deadline: float) -> int | None:
    """The code of the first that fails, negative for a signal, or 0. None if there was no end before the deadline."""
    first, late = 0, False
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            children.remove(child)
            if (code := os.waitstatus_to_exitcode(status)) and not first:
                first = code
                _send(signal.SIGTERM, children)
        elif time.monotonic() > deadline:
            _send(signal.SIGKILL, children)
            deadline, late = float("inf"), True
        else:
            time.sleep(0.01)
    return None if late else first


def _send(number: signal.Signals, children: set[int]) -> None:
    for child in children:
        os.kill(child, number)


def fork_trainings() -> None:
    """Let a command fork the runs that it starts."""
    from support import forked_training

    from myllm.cli import trials

    trials.start_training = forked_training.start_training


def draw_no_reports() -> None:
    from myllm.runs.report import html

    html.write_report = lambda run: None


def run_program(program: str, *words: str, cwd: str) -> None:
    if program == "-m":
        sys.argv, sys.path[0] = list(words), cwd
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [program, *words], str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")


def become(request: dict[str, Any]) -> int:
    """Run the words as `__main__`, and all that an interpreter does at its end but freeing memory: the exit code."""
    from support.exit_codes import exit_code  # the path is not set when this file is read

    for number, stream in enumerate(request["streams"]):
        file = os.open(stream, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if request["words"][0] == "-m":
        fork_trainings()
    elif not request["report"]:
        draw_no_reports()
    code = exit_code(lambda: run_program(*request["words"], cwd=request["cwd"]))
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    sys.path[1:1] = map(str, PATH)
    for name in IMPORTED:
        import_module(name)
    from myllm.cli.launch import parse_args
    from myllm.data.tokenizer.load import load_tokenizer

    parse_args(["debug"])  # compiles many regular expressions
    load_tokenizer().token_bytes()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page
    if request := serve():
        code = 70
        try:
            code = become(request)
        finally:
            os._exit(code)
