"""Saves that are cut short: killed at every boundary, and stopped by a full disk."""

import re
from pathlib import Path

import pytest
from fault_runs import Forks, Goes, run_of

from myllm.checkpoint import list_checkpoints, verify
from myllm.kills import saved_step

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all

MOST = 200
"""Starts; a save of today has some twenty boundaries."""


def killed(forks: Forks, config_file: Path, place: Path, name: str, number: int) -> list[str] | None:
    """Start a run that dies before call `number`; its calls until then, or None if it lived to the end."""
    run, events = run_of(place, name), place / "events.txt"
    before = saved_step(run)
    events.unlink(missing_ok=True)
    ended = forks(config_file, "--name", name, die_before={"number": number, "events": str(events)})
    assert saved_step(run) >= before, "a save was lost"
    for folder in list_checkpoints(run.checkpoints):
        assert not list(verify(folder)), f"{folder} has its final name and is not whole"
    assert ended.code in (0, -9), ended.said
    return None if ended.code == 0 else events.read_text().splitlines()


LAST_RENAME = re.compile(r"rename .*\.partial-step_\d+$")


def test_killed_around_a_save(forks: Forks, config_file: Path, place: Path, goes_on: Goes) -> None:
    """Before its first call, between its files, right before the rename, right after it, and as the next one begins."""
    calls = killed(forks, config_file, place, "around", MOST)
    assert calls is None
    calls = (place / "events.txt").read_text().splitlines()
    rename = 1 + next(number for number, call in enumerate(calls) if LAST_RENAME.match(call))
    for number, saved in ((1, 0), (3, 0), (rename - 1, 0), (rename, 0), (rename + 1, 2), (1, 2)):
        calls = killed(forks, config_file, place, "hit", number)
        assert len(calls) == number
        assert saved_step(run_of(place, "hit")) == saved
        assert bool(LAST_RENAME.match(calls[-1])) == (number == rename)
    goes_on("hit")


def test_one_run_killed_at_every_boundary_of_a_save(
    forks: Forks, config_file: Path, place: Path, goes_on: Goes
) -> None:
    """Start number k dies before the k-th call that touches the checkpoints, until one lives to the end."""
    deaths = []
    for number in range(1, MOST):
        calls = killed(forks, config_file, place, "cut", number)
        if calls is None:
            break
        deaths.append(re.sub(r"step_\d+", "step", calls[-1]))
    assert {"mkdir", "fsync", "rename", "replace", "unlink"} <= {death.split()[0] for death in deaths}
    assert len(set(deaths)) >= 15
    goes_on("cut")


def test_a_disk_that_fills_up(forks: Forks, config_file: Path, place: Path, goes_on: Goes) -> None:
    """A save of 4.8 MB where 0.5 to 3.5 MB fit into a file: refused, and the save before is whole."""
    run = run_of(place, "full")
    assert forks(config_file, "--name", "full", "--train.max-steps", "4").code == 0
    before = sorted(path.name for path in run.checkpoints.iterdir())
    for limit in (500_000, 3_500_000):
        ended = forks(config_file, "--name", "full", file_size=limit)
        assert ended.code == 2, ended.said
        assert re.search(r"error: no room to save step 6 in .*Free some space and start the same command", ended.said)
        assert "Traceback" not in ended.said
        assert sorted(path.name for path in run.checkpoints.iterdir()) == before
    goes_on("full")
