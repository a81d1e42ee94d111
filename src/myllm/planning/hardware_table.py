"""docs/hardware.md: the presets on common cards, made from the code, so that it is never behind it."""

from myllm.config import RunConfig
from myllm.presets import PRESETS, get_preset

from .forecast import EXPECTED_MFU, Forecast, parse_hardware, predict
from .memory_estimate import HEADROOM, predicted_bytes

FLEETS = (
    "1xRTX3060", "1xRTX3090", "1xRTX4090", "1xL4", "1xA100-40", "1xA100-80", "1xH100", "8xRTX4090", "8xA100-80",
    "8xH100",
)  # fmt: skip


def page() -> str:
    """The whole page, as `myllm plan --table` prints it."""
    low, high = (f"{share * 100:.0f} %" for share in EXPECTED_MFU)
    intro = f"""# Presets on common cards

Made by `myllm plan --table > docs/hardware.md`; a test compares this page with the code. Everything here is predicted
from the config, and nothing of it is measured on a GPU yet (docs/experiments.md says what is).

- **micro-batch** is the largest that fits and keeps the batch of tokens exact; give it with
  `--train.micro-batch-size`, or let `auto` find it on the machine itself. "as set" is the preset's own, where that fits
  too. Accumulation makes up the rest, so the batch, and with it the loss, is the same on every card.
- **peak** is what torch's allocator holds on one card, for compiled models in bfloat16, in GiB. A card is full at
  its memory less the driver's, CUDA's context, NCCL's buffers (several cards) and {HEADROOM * 100:.0f} % of headroom.
- **tokens/s** and **hours** are for {low} to {high} of the card's bfloat16 peak (`src/myllm/flops.py`), which published
  runs of this size reach; evaluations and saves are not in them. The smaller the model and the more the cards, the
  nearer to the lower figure, or below it: then the host and the network take longer than the arithmetic.

`myllm plan PRESET --gpus 4xL40S` says the same of any preset, changed settings and other cards, with memory by part.
"""
    return "\n".join([intro, *(_section(get_preset(name)) for name in PRESETS if name != "debug")])


def _section(config: RunConfig) -> str:
    tokens = config.train.max_steps * config.train.batch_tokens
    lines = [
        f"## {config.name}\n",
        f"{tokens / 1e9:.1f}B tokens, {config.train.batch_tokens:,} a step.\n",
        "| cards | micro-batch | as set | accumulation | peak GiB | tokens/s | hours |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(predict(config, parse_hardware(cards))) for cards in FLEETS), ""])


def _row(forecast: Forecast) -> str:
    fleet, fits = forecast.fleet, forecast.fits
    if fits is None:
        return f"| {fleet} | does not fit | | | | | |"
    shown = forecast.fitted_config
    accumulation = shown.train.batch_tokens // (fits * shown.model.max_seq_len * fleet.count)
    as_set = forecast.config.train.micro_batch_size if forecast.configured_batch_fits else "no"
    peak = predicted_bytes(shown, forecast.how) / 2**30
    rates, hours = forecast.tokens_per_s, forecast.hours
    speed = f"{_thousands(rates[0])} to {_thousands(rates[1])} | {hours[0]:.3g} to {hours[1]:.3g}" if rates else "? | ?"
    return f"| {fleet} | {fits} | {as_set} | {accumulation} | {peak:.1f} | {speed} |"


def _thousands(rate: float) -> str:
    return f"{rate / 1_000:,.0f}K"
