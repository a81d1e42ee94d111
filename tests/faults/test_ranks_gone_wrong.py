"""One of two ranks that computes nonsense, or nothing at all, while the other means well."""

import json
from pathlib import Path

import pytest
from support.fault_runs import Forks, Goes, record, run_of

from myllm.checkpoint.layout import newest_step
from myllm.errors import TrainingDiverged
from myllm.training.anomaly.dump import find_dump, read_dump

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all


@pytest.mark.parametrize("rank", [0, 1])
def test_nan_gradient_stops_all_ranks(rank: int, forks: Forks, config_file: Path, place: Path, goes_on: Goes) -> None:
    """Both stop with the dump of that step, and nothing that the NaN has touched is saved."""
    name = f"nan-{rank}"
    run = run_of(place, name)
    ended = forks(config_file, "--name", name, on=(rank,), nan=6)
    assert ended.code == TrainingDiverged.EXIT_CODE, ended.said
    assert "error: the gradient of step 6 is not finite" in ended.said
    assert "suspect the device" in ended.said, "the replayed step is sound"
    assert "Traceback" not in ended.said, ended.said
    assert newest_step(run.checkpoints) == 4
    assert read_dump(find_dump(name, run.root.parent)).summary["step"] == 6
    goes_on(name)


@pytest.mark.parametrize("rank", [0, 1])
def test_nan_gradient_skips_update(rank: int, forks: Forks, config_file: Path, place: Path) -> None:
    run = run_of(place, f"skip-{rank}")
    words = ("--name", run.root.name, "--train.on-nonfinite", "skip")
    ended = forks(config_file, *words, on=(rank,), nan=6)
    assert ended.code == 0, ended.said
    assert "skipped the update of step 6: its gradient is not finite" in ended.said
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 4, 8]
    assert [row["skipped_nonfinite"] for row in rows if row["kind"] == "train"] == [0] * 5 + [1] * 3
    assert sorted(record(run)) == list(range(1, 9))
    assert newest_step(run.checkpoints) == 8


@pytest.mark.parametrize("rank", [0, 1])
def test_hung_rank_reports_collective_timeout(
    rank: int, forks: Forks, config_file: Path, place: Path, goes_on: Goes
) -> None:
    """Both end, and the message names the one that did not come."""
    name = f"asleep-{rank}"
    run = run_of(place, name)
    ended = forks(config_file, "--name", name, "--train.collective-timeout-s", "10", on=(rank,), sleep=6)
    assert ended.code == 1, ended.said
    assert f"error: rank {rank} did not arrive in " in ended.said
    assert f"rank {rank} is in step 6, training" in ended.said
    assert sorted(path.name for path in run.stacks.glob("rank*.txt")) == ["rank0.txt", "rank1.txt"]
    assert newest_step(run.checkpoints) == 4
    goes_on(name)
