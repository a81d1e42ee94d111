"""`myllm COMMAND`: everything but training itself. Each command is a function whose arguments are its options."""

import sys
from collections.abc import Callable
from typing import Literal

import tyro

from . import (
    checkpoint_cli,
    data_cli,
    eval_cli,
    export_cli,
    plan_cli,
    preflight_cli,
    prove_cli,
    publish_cli,
    replay_cli,
    sample_cli,
    tokenizer_cli,
)
from .environment import set_for_libraries
from .errors import UserError, nearest
from .launch import clear_errors
from .output import open_output

Positional = tyro.conf.Positional


def report(run: Positional[str]) -> None:
    """Draw a run's plots and its report.html anew.

    Args:
        run: its name, or its folder.
    """
    from .report import find_run, write_report

    print(write_report(find_run(run)))


def doctor(distributed: bool = False, device: Literal["auto", "cpu", "cuda"] = "auto", timeout_s: float = 60.0) -> None:
    """Look at this machine and, with --distributed under torchrun, at the network between the ranks.

    Args:
        distributed: all-reduces between all ranks: whether the sums are right, and how fast they go.
        device: what carries them.
        timeout_s: how long the ranks wait for each other.
    """
    if distributed:
        from .network_check import check_network

        for line in check_network(device, timeout_s):
            print(line)
        return
    from .doctor import examine

    lines, faults = examine()
    print("\n".join(lines))
    if faults:
        raise UserError("this will hinder training:\n" + "\n".join(f"  - {fault}" for fault in faults))
    print("nothing here will hinder training")


def status(run: Positional[str], silent_s: float = 600.0) -> None:
    """Say in one line what a run is doing, or how it ended, and exit with the code that says the same.

    Exit codes: 0 complete; 75 not finished, start it again; 130, 143, 129, 131 stopped by SIGINT, SIGTERM, SIGHUP,
    SIGQUIT; 1, 2 failed, or no sign of life; 3 at work.

    Args:
        run: its name, or its folder.
        silent_s: no sign of life is when it has not got on for so many seconds.
    """
    from . import heartbeat

    line, code = heartbeat.status(run, silent_s)
    print(line)
    raise SystemExit(code)


COMMANDS: dict[str, Callable[..., None]] = {
    "data list": data_cli.list_sources,
    "data estimate": data_cli.estimate,
    "data prepare": data_cli.prepare,
    "data seal": data_cli.seal,
    "data verify": data_cli.verify,
    "data show": data_cli.show,
    "tokenizer train": tokenizer_cli.tokenizer_train,
    "plan": plan_cli.plan,
    "preflight": preflight_cli.preflight,
    "eval": eval_cli.evaluate,
    "sample": sample_cli.sample,
    "chat": sample_cli.chat,
    "serve": sample_cli.serve,
    "report": report,
    "replay": replay_cli.replay,
    "status": status,
    "export": export_cli.export,
    "import": export_cli.import_model,
    "publish": publish_cli.publish,
    "checkpoint list": checkpoint_cli.list_all,
    "checkpoint verify": checkpoint_cli.verify,
    "doctor": doctor,
    "prove-resume": prove_cli.prove_resume,
}
TAKES_WORDS = {"plan", "preflight", "prove-resume"}
"""Commands that begin with a preset, whose settings are then their options: they read the words themselves."""


def main(words: list[str] | None = None) -> None:
    """Run one command. Exit code 2 for a user's mistake."""
    set_for_libraries()
    open_output()
    words = sys.argv[1:] if words is None else words
    with clear_errors():
        if not words or words[0] in ("-h", "--help"):
            print(_usage())
            raise SystemExit(0 if words else 2)
        name = next((name for name in COMMANDS if words[: name.count(" ") + 1] == name.split()), None)
        if name is None:
            given = " ".join(words[:2] if words[0] in ("data", "tokenizer", "checkpoint") else words[:1])
            raise UserError(f"unknown command {given!r}{nearest(given, list(COMMANDS))}\n{_usage()}")
        rest = words[name.count(" ") + 1 :]
        if name in TAKES_WORDS:
            COMMANDS[name](rest)
        else:
            tyro.cli(COMMANDS[name], args=rest, prog=f"myllm {name}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "usage: myllm COMMAND ... (--help after a command lists its options)\n\n" + "\n".join(lines)
