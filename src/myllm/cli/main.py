"""`myllm COMMAND`: everything but training itself. Each command is a function whose arguments are its options.

Not tyro's subcommands, which need every option in advance: the options of plan, preflight and prove-resume have the
preset's values as their defaults.
"""

import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Literal

import tyro

from myllm.distributed.library_env import set_library_env
from myllm.distributed.standard_streams import protect_output
from myllm.errors import UserError, bullets, did_you_mean

from . import checkpoint as checkpoint_cli
from . import data as data_cli
from . import eval as eval_cli
from . import export as export_cli
from . import plan as plan_cli
from . import replay as replay_cli
from . import sample as sample_cli
from . import tokenizer as tokenizer_cli
from .errors import exit_on_error
from .ladder import command as ladder_cli
from .parse import parse_arguments, version
from .prove_resume import command as prove_cli
from .runs import command as runs_cli
from .runs import datasets as datasets_cli
from .runs import report as report_cli
from .tune import command as tune_cli

Positional = tyro.conf.Positional


def doctor(distributed: bool = False, device: Literal["auto", "cpu", "cuda"] = "auto", timeout_s: float = 60.0) -> None:
    """Check this machine, or with --distributed the network between the ranks.

    Args:
        distributed: check the results and the speed of all-reduces; start it with torchrun.
        device: device of the all-reduces.
        timeout_s: seconds that the ranks wait for each other.
    """
    plan_cli.check_limit("timeout_s", timeout_s)
    if distributed:
        from myllm.distributed.network_check import check_network

        for line in check_network(device, timeout_s):
            print(line)
        return
    from .doctor import check_machine

    lines, problems = check_machine()
    print("\n".join(lines))
    if problems:
        raise UserError(f"problems found:\n{bullets(problems)}")
    print("no problems found")


def status(run: Positional[str], silent_s: float = 600.0) -> None:
    """Print what a run is doing or how it ended, in one line.

    Exit codes: 0 complete; 75 not finished, run it again; 130, 143, 129, 131 stopped by SIGINT, SIGTERM, SIGHUP,
    SIGQUIT; 1, 2 failed (1: or not responding); 3 running.

    Args:
        run: name or folder of the run.
        silent_s: a run that makes no progress for this many seconds is not responding.
    """
    plan_cli.check_limit("silent_s", silent_s)
    from myllm.runs import heartbeat

    line, code = heartbeat.status(run, silent_s)
    print(line)
    raise SystemExit(code)


COMMANDS: dict[str, Callable[..., None]] = {
    "data list": data_cli.list_sources,
    "data estimate": data_cli.estimate,
    "data prepare": data_cli.prepare,
    "data merge": data_cli.merge,
    "data verify": data_cli.verify,
    "data show": data_cli.show,
    "data delete": datasets_cli.delete,
    "tokenizer train": tokenizer_cli.tokenizer_train,
    "plan": plan_cli.plan,
    "preflight": plan_cli.preflight,
    "eval": eval_cli.evaluate,
    "sample": sample_cli.sample,
    "chat": sample_cli.chat,
    "serve": sample_cli.serve,
    "runs": runs_cli.list_runs,
    "runs delete": runs_cli.delete,
    "runs rename": runs_cli.rename,
    "runs archive": runs_cli.archive,
    "runs sync": runs_cli.sync,
    "report": report_cli.report,
    "replay": replay_cli.replay,
    "status": status,
    "export": export_cli.export,
    "import": export_cli.import_model,
    "publish": export_cli.publish,
    "checkpoint list": checkpoint_cli.list_all,
    "checkpoint verify": checkpoint_cli.verify,
    "doctor": doctor,
    "prove-resume": prove_cli.prove_resume,
    "tune": tune_cli.tune,
    "ladder": ladder_cli.ladder,
}
GROUPS = tuple(dict.fromkeys(name.split()[0] for name in COMMANDS if " " in name))
"""First words of two-word commands. `runs` alone is a command too."""
TAKES_WORDS = {"plan", "preflight", "prove-resume", "tune", "ladder"}
"""Commands that parse the words themselves: they begin with presets."""


def main(words: list[str] | None = None) -> None:
    """Run one command. A user error exits with code 2."""
    set_library_env()
    protect_output()
    words = sys.argv[1:] if words is None else words
    with exit_on_error():
        if words[:1] == ["--version"]:
            print(version())
            return
        if words[:2] == ["runs", "list"]:  # as `myllm data list` and `myllm checkpoint list`
            words = ["runs", *words[2:]]
        group = words[0] if words and words[0] in GROUPS else ""
        n_words = 2 if group and words[1:] and not words[1].startswith("-") else 1
        name, rest = " ".join(words[:n_words]), words[n_words:]
        if name in TAKES_WORDS:
            COMMANDS[name](rest)
        elif name in COMMANDS:
            parse_arguments(COMMANDS[name], rest, f"myllm {name}")
        elif name in ("", "-h", "--help", group):
            print(_usage(group))
            raise SystemExit(0 if {"-h", "--help"} & set(words) else 2)
        else:
            # Without the word that a group shares: with it, `runs lst` is close to `runs delete`.
            prefix = f"{group} " if group else ""
            known = [command.removeprefix(prefix) for command in COMMANDS if command.startswith(group)]
            suggestion = did_you_mean(name.removeprefix(prefix), known).replace("'", f"'{prefix}", 1)
            raise UserError(f"unknown command {name!r}{suggestion}\n\n{_usage(group)}")


def _usage(group: str = "") -> str:
    """The commands, or those of one group, each with its description."""
    shown = {name: command for name, command in COMMANDS.items() if name.startswith(group)}
    indent = max(map(len, shown)) + 4
    width = shutil.get_terminal_size().columns
    lines = [
        textwrap.fill(
            (command.__doc__ or "").splitlines()[0], width, initial_indent=f"  {name}".ljust(indent),
            subsequent_indent=" " * indent,
        )
        for name, command in shown.items()
    ]  # fmt: skip
    return (
        f"usage: myllm {f'{group} ' if group else ''}COMMAND ...\n"
        "       myllm COMMAND --help      list a command's options\n\n" + "\n".join(lines)
    )
