"""`myllm preflight PRESET [overrides]`: a short rehearsal of a run, alone or under torchrun."""

import signal
from dataclasses import dataclass

from myllm.distributed import launcher as ranks
from myllm.distributed.standard_streams import protect_output
from myllm.errors import UserError

from .launch import RunArgs, parse_run_args

USAGE = """usage: myllm preflight PRESET [--config FILE.json] [--max-hours H] [--dollars-per-hour X] [overrides]

Rehearse a run before it starts: does it fit, how long does it take, what does it cost? Leaves nothing behind,
but with --train.micro-batch-size auto the size that it found, which the run takes.

presets:
{presets}

options:
  --config FILE.json    lay a saved or hand-written config over the preset (which may then be left out)
  --max-hours H         refuse a run that needs more hours than this from here on
  --dollars-per-hour X  of all machines of the run together: say what the rest of it costs
  overrides             any setting of the config, as for pretrain.py

With several GPUs:
  torchrun --standalone --nproc_per_node=8 -m myllm preflight PRESET
"""


ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class PreflightLaunch(RunArgs):
    """What `myllm preflight` is asked."""

    max_hours: float | None = None
    """Refuse a run that needs more hours than this from here on."""
    dollars_per_hour: float | None = None
    """Of all machines of the run together: prints what the rest of it costs."""


def preflight(words: list[str]) -> None:
    """Rehearse a run: does it fit, how long will it take, what will it cost?"""
    wanted = parse_run_args(PreflightLaunch, words, USAGE)
    for name in ("max_hours", "dollars_per_hour"):
        value = getattr(wanted, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be above 0 and finite")
    from myllm.data.prepare.background import check_data_names

    if ranks.local_rank() == 0:
        check_data_names(wanted.config.data)  # before the seconds that torch takes
    from myllm.distributed.collectives import process_group
    from myllm.training.preflight.batch_size import save_for_run
    from myllm.training.preflight.preflight import preflight as rehearse
    from myllm.training.preflight.summary import Limits

    def say(line: str) -> None:
        if ranks.rank() == 0:
            print(f"preflight: {line} ...", flush=True)

    protect_output(keep_going=True)  # what comes after it does not depend on who watches
    ends = [each for each in ENDS if signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, _leave) for number in ends}
    try:
        with process_group(wanted.config.train.device) as process:
            bounds = Limits(wanted.max_hours, wanted.dollars_per_hour)
            findings = rehearse(wanted.config, process, bounds, say, own_text=wanted.own_text)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if process.is_rank_zero:
        print(findings.table(), flush=True)
    if refusals := findings.problems():
        raise UserError("this run would not work:\n" + "\n".join(f"  - {refusal}" for refusal in refusals))
    if wanted.config.train.micro_batch_size == "auto" and findings.measured and process.is_rank_zero:
        try:
            save_for_run(findings.config, process, findings.measured.peak_bytes)
        except OSError as error:
            say(f"cannot leave the micro-batch size for the run, which will find it again: {error.strerror}")


def _leave(number: int, _: object) -> None:
    """As on Ctrl-C: an exception, so that the temporary folder goes too."""
    raise SystemExit(128 + number)
