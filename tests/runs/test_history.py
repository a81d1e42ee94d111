"""Reading a run's files back."""

from pathlib import Path

import numpy as np
import pytest
from support.run_files import full_rows, train_row, write_run

from myllm.paths import RunPaths
from myllm.runs.history import centered_mean, find_run, moving_average, read_metrics


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return write_run(tmp_path / "runs/small", full_rows())


def test_reads_every_row(run: RunPaths) -> None:
    metrics = read_metrics(run.metrics)
    assert [row["step"] for row in metrics.train] == list(range(5, 201, 5))
    assert {name: len(rows) for name, rows in metrics.evals.items()} == {"validation": 3, "cloze": 2, "hellaswag": 2}
    assert metrics.last("validation")["loss"] == 3.25
    assert metrics.skipped == 0
    assert metrics.tokens_at([0, 101, 200]) == pytest.approx([0, 101_000, 200_000])
    assert metrics.training_s() == pytest.approx(200_000 / 2_000)


def test_truncated_last_line_is_skipped(run: RunPaths) -> None:
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole + b'{"kind": "train", "step": 205, "note": "caf\xc3')  # cut inside a character too
    metrics = read_metrics(run.metrics)
    assert metrics.last()["step"] == 200
    assert metrics.skipped == 1


def test_repeated_steps_count_once(tmp_path: Path) -> None:
    first = [train_row(step, loss=9.0) for step in (10, 20, 30, 40)]
    resumed = [train_row(step, loss=5.0) for step in (30, 40, 50)]
    metrics = read_metrics(write_run(tmp_path / "run", first + resumed).metrics)
    assert [(row["step"], row["loss"]) for row in metrics.train] == [(10, 9), (20, 9), (30, 5), (40, 5), (50, 5)]


def test_find_run_by_name_or_folder(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYLLM_DATA", str(run.root.parents[1]))
    assert find_run("small") == run
    assert find_run(run.root) == run
    assert find_run("absent").root == run.root.parent / "absent"


def test_moving_average_ignores_non_finite_values() -> None:
    values = np.sin(np.arange(200.0))
    values[[50, 60, 199]] = [np.nan, np.inf, np.nan]
    mean = moving_average(values, half_window=0.05)  # 10 to each side
    for index in (80, 150, 199):
        window = values[index - 10 : index + 11]
        assert mean[index] == pytest.approx(window[np.isfinite(window)].mean())
    assert mean[0] == values[0]
    assert np.isfinite(mean).all()


def test_centered_mean():
    """By hand: HellaSwag (0.40 - 0.25) / 0.75 = 0.2, PIQA (0.65 - 0.5) / 0.5 = 0.3, LAMBADA 0.1; their mean is 0.2."""
    rows = {
        "hellaswag": {
            "acc": 0.3,
            "acc_norm": 0.4,
            "acc_stderr": 0.9,
            "acc_norm_stderr": 0.003,
        },  # of an earlier version
        "piqa": {"acc": 0.6, "acc_norm": 0.65, "acc_norm_stderr": 0.01, "chance": 0.5},
        "lambada": {"acc": 0.1, "acc_stderr": 0.01, "perplexity": 50.0, "chance": 0.0},
        "cloze": {"acc": 0.9, "acc_norm": 0.9, "acc_stderr": 0.01, "protocol": 2},  # of its own text: no public task
        "winogrande": {"acc": None, "chance": 0.5},
    }
    mean = centered_mean(rows)
    assert mean
    assert mean.value == pytest.approx(0.2)
    assert mean.stderr == pytest.approx((0.004**2 + 0.02**2 + 0.01**2) ** 0.5 / 3)
    assert mean.tasks == ["hellaswag", "piqa", "lambada"]
    assert centered_mean({"piqa": rows["piqa"]}) is None
    assert centered_mean({}) is None
