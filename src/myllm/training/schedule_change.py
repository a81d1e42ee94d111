"""What a restart with another schedule does to the learning rate."""

from myllm.config import RunConfig
from myllm.errors import UserError
from myllm.optim.lr_schedule import rate_factor
from myllm.planning.length import decay_start

RATE_JUMP = 1.25
"""A learning rate that rises by more than this factor between two steps makes the loss rise."""


def check_schedule_change(step: int, earlier: RunConfig, config: RunConfig) -> None:
    """Refuse to raise the rate of wsd again once its decay has begun, because that undoes what the decay has gained.

    Args:
        step: updates made so far, with the schedule of `earlier`.

    Raises:
        UserError: the new settings would do that.
    """
    start = decay_start(earlier.optim, earlier.train.max_steps)
    if not (earlier.optim.schedule == config.optim.schedule == "wsd" and start < step < config.train.max_steps):
        return
    planned, factor = (rate_factor(step, run.optim, run.train.max_steps) for run in (earlier, config))
    last, following = rates(step - 1, earlier), rates(step, config)
    if factor <= planned or all(rate <= last[name] for name, rate in following.items()):
        return
    raise UserError(
        f"the run is at step {step:,} and its learning rate has been decaying since step {start:,}. A wsd run can be "
        f"lengthened (from {earlier.train.max_steps:,} to {config.train.max_steps:,} steps), or its decay shortened, "
        f"only before the decay begins. To resume from a checkpoint of step {start:,} or earlier (`myllm checkpoint "
        f"list {config.name}` shows them), move the later ones out of the run's checkpoints/. Otherwise keep the "
        "old settings, start a second run with another --name, or start over with --train.fresh (the old run is moved "
        "aside)"
    )


def describe_schedule_change(step: int, earlier: RunConfig, config: RunConfig) -> str | None:
    """A sentence about the learning rate if the run's length has changed, else None.

    Args:
        step: updates made so far, with the schedule of `earlier`.
    """
    before, end = earlier.train.max_steps, config.train.max_steps
    if before == end or not 0 < step < end:
        return None
    last, following, final = rates(step - 1, earlier), rates(step, config), rates(end, config)
    changes = ", and ".join(
        f"{name} was {last[name]:.3g} at the last step, is {rate:.3g} at the next and {final[name]:.3g} at the end"
        for name, rate in following.items()
    )
    planned = rates(step, earlier)  # in the warm-up, the rate rises that fast anyway
    rises = following != planned and any(rate > RATE_JUMP * last[name] for name, rate in following.items())
    advice = "; the loss will rise before it falls (a lower peak makes that smaller)" if rises else ""
    return f"the schedule now ends at step {end:,} instead of {before:,}: {changes}{advice}"


def rates(step: int, config: RunConfig) -> dict[str, float]:
    """The rates of update number `step`, by name."""
    peaks = {"the learning rate": config.optim.max_lr}
    if config.optim.optimizer == "muon":
        peaks["Muon's"] = config.optim.muon_lr
    factor = rate_factor(step, config.optim, config.train.max_steps)
    return {name: peak * factor for name, peak in peaks.items()}
