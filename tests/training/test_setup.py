"""What a restart says about the learning rate."""

from dataclasses import replace

from myllm.config import OptimConfig, RunConfig, TrainConfig
from myllm.training.setup import describe_lr_jump

RUN = RunConfig(
    optim=OptimConfig(max_lr=1e-3, min_lr_ratio=0.0, warmup_steps=10, schedule="linear"),
    train=TrainConfig(max_steps=100),
)


def until(max_steps: int, **optim: object) -> RunConfig:
    return replace(RUN, optim=replace(RUN.optim, **optim), train=replace(RUN.train, max_steps=max_steps))


def test_a_finished_run_that_is_extended_is_told_its_rate() -> None:
    """The last of 100 steps has 1e-3 / 90; step 100 of 1,000, after 10 of warm-up, has 1e-3 x 900 / 990."""
    assert describe_lr_jump(100, RUN, until(1_000)) == (
        "the learning rate was 1.11e-05 at the last step and is 0.000909 at the next: the schedule now ends at step "
        "1,000 instead of 100; the loss will rise before it falls (a lower --optim.max-lr makes that smaller)"
    )


def test_a_shortened_run_is_told_too_but_no_rise_is_predicted() -> None:
    note = describe_lr_jump(50, RUN, until(60))
    assert "the schedule now ends at step 60 instead of 100" in note
    assert "rise" not in note


def test_another_rate_is_told() -> None:
    assert "is 0.0111 at the next: optim settings have changed;" in describe_lr_jump(90, RUN, until(100, max_lr=1e-1))


def test_what_goes_on_as_planned_says_nothing() -> None:
    assert describe_lr_jump(50, RUN, RUN) is None
    assert describe_lr_jump(5, RUN, RUN) is None, (
        "in the warm-up the rate rises by more than a quarter a step, as planned"
    )
    assert describe_lr_jump(0, RUN, until(1_000)) is None
    assert describe_lr_jump(100, RUN, RUN) is None
    stable = until(100, schedule="wsd", decay_fraction=0.5)
    assert describe_lr_jump(40, stable, until(1_000, schedule="wsd", decay_fraction=0.5)) is None, "before wsd's decay"
