"""Garbage is collected after the steps that are due, and never within one."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from conftest import with_train
from training.test_loop import run

from myllm.config import RunConfig
from myllm.training import loop, services
from myllm.training.services import GcSchedule


class Node:
    """With itself it makes a cycle, which counting references cannot free."""

    def __init__(self) -> None:
        self.itself = self


def cycle() -> weakref.ref:
    return weakref.ref(Node())


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations that Python collected, from here on."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.collect()
    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


@contextmanager
def many_objects() -> Iterator[None]:
    """Enough of them that Python would collect, many times over."""
    kept = [[] for _ in range(5_000)]
    yield
    kept.extend([] for _ in range(5_000))


@pytest.fixture
def thawed() -> Iterator[None]:
    """Nothing is frozen, as in an ordinary program."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_python_collects_without_schedule(collections: list[int]) -> None:
    with many_objects():
        assert collections


def test_schedule_collects_only_when_due(thawed: None, collections: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "COLLECT_EVERY_STEPS", 5)
    found = []
    with GcSchedule(step=7) as schedule:
        for step in range(8, 22):
            left = cycle()
            with many_objects():
                pass
            assert left() is not None, f"within step {step}"
            before = len(collections)
            schedule.after_step(step)
            if len(collections) > before:
                found.append(step)
                assert left() is None
        assert gc.get_freeze_count() > 0
    assert found == [8, 10, 15, 20], "the first of this process, and those that the number decides"
    assert collections == [2] * 5, "and one at the beginning"
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_garbage_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made after the first step is found, however long the run."""
    monkeypatch.setattr(services, "COLLECT_EVERY_STEPS", 10)
    alive: list[weakref.ref] = []
    with GcSchedule(step=0) as schedule:
        for step in range(1, 101):
            alive = [reference for reference in [*alive, cycle()] if reference() is not None]
            schedule.after_step(step)
            assert len(alive) <= 10
            if step % 10 == 0:
                assert not [reference for reference in alive if reference() is not None]


@pytest.mark.parametrize("error", [None, KeyError])
def test_automatic_collection_during_evaluation(error: type[Exception] | None) -> None:
    left = None

    def evaluate(schedule: GcSchedule) -> None:
        nonlocal left
        with schedule.automatic():
            assert gc.isenabled()
            left = cycle()
            if error:
                raise error

    with GcSchedule(step=0) as schedule:
        with suppress(KeyError):
            evaluate(schedule)
        assert not gc.isenabled()
        assert left() is None


def test_schedule_preserves_frozen_objects(thawed: None) -> None:
    gc.freeze()
    with GcSchedule(step=0):
        pass
    assert gc.get_freeze_count() > 0


def test_no_collection_during_training_step(
    tiny: RunConfig, collections: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "COLLECT_EVERY_STEPS", 4)
    within, real = [], loop.train_step
    after: dict[int, int] = {}

    def step(*arguments: object) -> object:
        before = len(collections)
        with many_objects():
            result = real(*arguments)
        within.append(len(collections) - before)
        return result

    def note(schedule: GcSchedule, number: int, done=GcSchedule.after_step) -> None:
        before = len(collections)
        done(schedule, number)
        after[number] = len(collections) - before

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(GcSchedule, "after_step", note)
    run(with_train(tiny, max_steps=9))
    assert within == [0] * 9
    assert [number for number, count in after.items() if count] == [1, 4, 8]
    assert gc.isenabled()
