"""What a restart with another schedule says about the learning rate, and what it refuses."""

from dataclasses import replace

import pytest

from myllm.config import OptimConfig, RunConfig, TrainConfig
from myllm.errors import UserError
from myllm.training.schedule_change import check_schedule_change, describe_schedule_change

RUN = RunConfig(
    optim=OptimConfig(max_lr=1e-3, min_lr_ratio=0.0, warmup_steps=10, schedule="linear"),
    train=TrainConfig(max_steps=100),
)


def until(max_steps: int, **optim: object) -> RunConfig:
    return replace(RUN, optim=replace(RUN.optim, **optim), train=replace(RUN.train, max_steps=max_steps))


def wsd(max_steps: int, **optim: object) -> RunConfig:
    """Level until half of the steps."""
    return until(max_steps, **{"schedule": "wsd", "decay_fraction": 0.5} | optim)


def test_extending_finished_run_describes_rates() -> None:
    """The last of 100 steps has 1e-3 / 90; step 100 of 1,000, after 10 of warm-up, has 1e-3 x 900 / 990."""
    assert describe_schedule_change(100, RUN, until(1_000)) == (
        "the schedule now ends at step 1,000 instead of 100: the learning rate was 1.11e-05 at the last step, is "
        "0.000909 at the next and 0 at the end; the loss will rise before it falls (a lower peak makes that smaller)"
    )


def test_description_includes_muon_rate() -> None:
    muon = {"optimizer": "muon", "muon_lr": 0.02, "min_lr_ratio": 0.1, "schedule": "cosine"}
    note = describe_schedule_change(55, until(100, **muon), until(300, **muon))
    # Factors: one of 90 steps before half of the decay 0.1 + 0.45 (1 + sin 2°) = 0.566; after 45 of 290 steps
    # 0.1 + 0.45 (1 + cos 27.9°) = 0.948.
    assert "the learning rate was 0.000566 at the last step" in note
    assert "and Muon's was 0.0113 at the last step, is 0.019 at the next and 0.002 at the end; the loss" in note


def test_shortened_run_predicts_no_loss_rise() -> None:
    note = describe_schedule_change(50, RUN, until(60))
    assert "the schedule now ends at step 60 instead of 100" in note
    assert "rise" not in note
    # Of 60 steps, level until 30: at step 50, a third of the decay is left.
    note = describe_schedule_change(50, wsd(100), wsd(60))
    assert note.endswith("was 0.001 at the last step, is 0.000333 at the next and 0 at the end")
    check_schedule_change(50, wsd(100), wsd(60))


def test_small_length_change_is_described() -> None:
    note = describe_schedule_change(55, RUN, until(110))
    assert note.endswith("was 0.000511 at the last step, is 0.00055 at the next and 0 at the end")


def test_unchanged_schedule_has_no_description() -> None:
    assert describe_schedule_change(50, RUN, RUN) is None
    assert describe_schedule_change(0, RUN, until(1_000)) is None
    assert describe_schedule_change(100, RUN, RUN) is None


def test_wsd_extended_before_decay_keeps_rate() -> None:
    for step in (11, 40, 50, 51):  # update 50, the 51st, is the last one at the peak
        check_schedule_change(step, wsd(100), wsd(1_000))
        assert describe_schedule_change(step, wsd(100), wsd(1_000)) == (
            "the schedule now ends at step 1,000 instead of 100: the learning rate was 0.001 at the last step, is "
            "0.001 at the next and 0 at the end"
        )


@pytest.mark.parametrize("step", [52, 75, 100])
def test_wsd_extension_after_decay_raises(step: int) -> None:
    with pytest.raises(UserError) as error:
        check_schedule_change(step, wsd(100), wsd(1_000))
    assert str(error.value).startswith(
        f"the run is at step {step} and its learning rate has been decaying since step 50. A wsd run can be lengthened "
        "(from 100 to 1,000 steps), or its decay shortened, only before the decay begins."
    )


def test_only_rising_rate_during_decay_raises() -> None:
    check_schedule_change(75, wsd(100), wsd(100))
    check_schedule_change(75, wsd(100), wsd(80))
    check_schedule_change(75, wsd(100), wsd(100, max_lr=2e-3))  # the schedule is the same
    check_schedule_change(75, wsd(100), until(1_000, schedule="cosine"))  # a choice, which is described
    check_schedule_change(75, wsd(100), wsd(1_000, max_lr=5e-4))  # level at the rate of the last step, 0.52e-3
    check_schedule_change(100, wsd(100), wsd(100))
    level = wsd(100, decay_fraction=0.0)
    check_schedule_change(100, level, wsd(200, decay_fraction=0.0))
    with pytest.raises(UserError, match="its decay shortened"):
        check_schedule_change(75, wsd(100), wsd(100, decay_fraction=0.1))
