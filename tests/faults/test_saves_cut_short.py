"""Saves that are cut short: killed at every boundary, and stopped by a full disk."""

import re
from pathlib import Path

import pytest
from support.fault_runs import Forks, Goes, run_of

from myllm.checkpoint.integrity import verify_checkpoint
from myllm.checkpoint.layout import list_checkpoints, newest_step

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all

MOST = 200
"""Starts; a save of today has some twenty boundaries."""
LAST_RENAME = re.compile(r"rename .*\.partial-step_(\d+)$")


def killed(
    forks: Forks, config_file: Path, place: Path, name: str, number: int, rank: int = 0, kill_all: bool = False
) -> list[str] | None:
    """Start a run of which a rank dies before its call `number`; its calls until then, or None if it lived to the
    end. A save counts from the moment in which rank 0 gives it its name, and not before."""
    run, events = run_of(place, name), place / "events.txt"
    before = newest_step(run.checkpoints)
    events.unlink(missing_ok=True)
    fault = {"number": number, "events": str(events)}
    ended = forks(config_file, "--name", name, on=(rank,), kill_all=kill_all, die_before=fault)
    calls = events.read_text().splitlines() if events.exists() else []  # the last start finds nothing to do
    if rank == 0:
        renames = [LAST_RENAME.match(call) for call in (calls if ended.code == 0 else calls[:-1])]
        saves = [int(rename[1]) for rename in renames if rename]
        assert newest_step(run.checkpoints) == max(saves, default=before), calls
    else:
        assert newest_step(run.checkpoints) >= before, "a save was lost"
    for folder in list_checkpoints(run.checkpoints):
        assert not list(verify_checkpoint(folder)), f"{folder} has its final name and is not whole"
    assert ended.code in (0, -9), ended.said
    return None if ended.code == 0 else calls


@pytest.mark.parametrize(("rank", "kill_all"), [(0, False), (0, True), (1, False)], ids=["first", "all", "second"])
def test_kill_at_every_save_boundary(
    rank: int, kill_all: bool, forks: Forks, config_file: Path, place: Path, goes_on: Goes
) -> None:
    """Of start number k a rank dies before its k-th call that touches the checkpoints, until one lives to the end."""
    deaths, name = [], f"cut-{rank}-{kill_all}"
    for number in range(1, MOST):
        calls = killed(forks, config_file, place, name, number, rank, kill_all)
        if calls is None:
            break
        deaths.append(re.sub(r"step_\d+", "step", calls[-1]))
    # The first rank makes the folder, its manifest and its name; the second writes its share of the tensors alone.
    expected = {"mkdir", "fsync", "rename", "replace", "unlink"} if rank == 0 else {"fsync"}
    assert expected <= {death.split()[0] for death in deaths}
    assert len(set(deaths)) >= (15 if rank == 0 else 1), deaths
    goes_on(name)


def test_full_disk_preserves_last_checkpoint(forks: Forks, config_file: Path, place: Path, goes_on: Goes) -> None:
    """Where 20 or 200 kB fit into a file, shares of weights (155 kB) and moments (320 kB) are refused, and the save
    before is whole."""
    run = run_of(place, "full")
    assert forks(config_file, "--name", "full", "--train.max-steps", "4").code == 0
    before = sorted(path.name for path in run.checkpoints.iterdir())
    for limit in (20_000, 200_000):
        ended = forks(config_file, "--name", "full", file_size=limit)
        assert ended.code == 2, ended.said
        assert re.search(r"error: no space to save step 6 in .*Free some space and run the same command", ended.said)
        assert "Traceback" not in ended.said, ended.said
        assert sorted(path.name for path in run.checkpoints.iterdir()) == before
    goes_on("full")
