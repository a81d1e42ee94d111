"""`myllm preflight PRESET [overrides]`: a short rehearsal of a run, in one process or under torchrun."""

import signal
from dataclasses import dataclass

from myllm.distributed import launcher
from myllm.distributed.standard_streams import protect_output
from myllm.errors import UserError

from .launch import RunArgs, parse_run_args

USAGE = """usage: myllm preflight PRESET [--config FILE.json] [--max-hours H] [--dollars-per-hour X] [overrides]

Rehearse a run before it starts: does it fit, how long does it take, what does it cost? Nothing is left behind, except
that with --train.micro-batch-size auto the run uses the size that the preflight found.

presets:
{presets}

options:
  --config FILE.json    lay a saved or hand-written config over the preset (which may then be omitted)
  --max-hours H         fail if the rest of the run needs more hours
  --dollars-per-hour X  price of all machines of the run together: print the cost of the rest of the run
  overrides             any setting of the config, as for pretrain.py

With several GPUs:
  torchrun --standalone --nproc_per_node=8 -m myllm preflight PRESET
"""


SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class PreflightArgs(RunArgs):
    """Command-line arguments of `myllm preflight`."""

    max_hours: float | None = None
    """Fail if the rest of the run needs more hours."""
    dollars_per_hour: float | None = None
    """Price of all machines of the run together: print the cost of the rest of the run."""


def preflight(words: list[str]) -> None:
    """Rehearse a run: does it fit, how long will it take, what will it cost?"""
    args = parse_run_args(PreflightArgs, words, USAGE)
    config = args.config
    for name in ("max_hours", "dollars_per_hour"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be above 0 and finite")
    from myllm.data.prepare.background import check_data_names

    if launcher.local_rank() == 0:
        check_data_names(config.data)  # before the seconds that importing torch takes
    from myllm.distributed.collectives import process_group
    from myllm.training.preflight import rehearsal
    from myllm.training.preflight.batch_size import save_for_run
    from myllm.training.preflight.summary import Limits

    def say(line: str) -> None:
        if launcher.rank() == 0:
            print(f"preflight: {line} ...", flush=True)

    protect_output(keep_going=True)  # what runs next needs the result even if nobody reads the output
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, _exit) for number in handled}
    try:
        with process_group(config.train.device) as dist:
            limits = Limits(args.max_hours, args.dollars_per_hour)
            result = rehearsal.preflight(config, dist, limits, say, own_text=args.own_text)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if dist.is_rank_zero:
        print(result.table(), flush=True)
    if problems := result.problems():
        raise UserError("\n".join(["this run would fail:", *(f"  - {problem}" for problem in problems)]))
    if config.train.micro_batch_size == "auto" and result.measured and dist.is_rank_zero:
        try:
            save_for_run(result.config, dist, result.measured.peak_bytes)
        except OSError as error:
            say(f"cannot save the micro-batch size; the run will search for it again: {error.strerror}")


def _exit(number: int, _: object) -> None:
    """Raise, as Ctrl-C does, so that the temporary folder is removed."""
    raise SystemExit(128 + number)
