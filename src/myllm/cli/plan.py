"""`myllm plan PRESET --gpus 8xA100-80`: does a run fit there, with which micro-batch, and for how long?"""

from dataclasses import dataclass

from myllm.errors import UserError
from myllm.planning import forecast
from myllm.planning.length import length_note

from .launch import RunArgs, parse_run_args

USAGE = """usage: myllm plan PRESET --gpus 8xA100-80 [--config FILE.json] [overrides]

Predict a run's memory by part, the largest micro-batch that fits, accumulation steps and time. Nothing is measured.

presets:
{presets}

options:
  --gpus CARDS        how many of which card: 8xA100-80, 1xRTX3060, H100, or cpu; an unknown name lists all
  --config FILE.json  lay a saved or hand-written config over the preset (which may then be left out)
  overrides           any setting of the config, as for pretrain.py: --train.parallel fsdp

`myllm plan --table` prints the presets on common cards, as in docs/hardware.md.
"""


@dataclass(frozen=True)
class PlanLaunch(RunArgs):
    """What `myllm plan` is asked."""

    gpus: str = ""
    """How many of which card: 8xA100-80, 1xRTX3060, H100, or cpu."""


def plan(words: list[str]) -> None:
    """Predict memory, micro-batch and hours of a run on given GPUs."""
    if words == ["--table"]:
        from myllm.planning.hardware_table import page

        print(page(), end="")
        return
    wanted = parse_run_args(PlanLaunch, words, USAGE)
    if not wanted.gpus:
        raise UserError("missing --gpus, for example --gpus 8xA100-80 or --gpus cpu")
    if note := length_note(wanted.config, wanted.own_text):
        print(note)
    print(forecast.format_forecast(forecast.predict(wanted.config, forecast.parse_hardware(wanted.gpus))))
