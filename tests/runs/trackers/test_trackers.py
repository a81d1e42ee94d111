"""The real packages, offline: what they show of a run is what metrics.jsonl says, each step once."""

import math
import socket
from pathlib import Path

import pytest
from conftest import train_rows, with_train, write_run_config
from support.tracker_readers import READERS
from training.test_loop import run, run_until

from myllm.cli.main import main
from myllm.config import RunConfig
from myllm.errors import UserError
from myllm.paths import RunPaths
from myllm.runs.logs import JsonlFile
from myllm.runs.run_dir import truncate_logs
from myllm.runs.trackers import background
from myllm.runs.trackers.background import sync
from myllm.runs.trackers.destinations import check_installed


@pytest.fixture(autouse=True)
def _offline(temp_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(temp_data / "trackio"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def write_rows(paths: RunPaths, first: int, last: int, loss: float) -> None:
    metrics = JsonlFile(paths.metrics)
    for step in range(first, last + 1):
        metrics.append({"kind": "train", "step": step, "loss": loss + step, "mfu": None, "sample_digest": "ab"})
        if step % 2 == 0:
            metrics.append(
                {"kind": "eval", "name": "validation", "step": step, "loss": math.nan if step == 4 else loss}
            )
            metrics.append({"kind": "overhead", "step": step, "seconds": {"saving": 1.0}})


# MLflow alone takes ten seconds to make its database.
NAMES = [pytest.param(name, marks=pytest.mark.slow if name == "mlflow" else []) for name in READERS]


@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_continues_curve(name: str, tiny: RunConfig, temp_data: Path) -> None:
    """A crash after step 5; the newest checkpoint is of step 2."""
    pytest.importorskip(name)
    paths = RunPaths.of("tiny")
    paths.root.mkdir(parents=True)
    write_run_config(tiny, paths.config)
    write_rows(paths, 1, 5, loss=10)
    assert sync(paths, name) == 7
    truncate_logs(paths, 2)
    write_rows(paths, 3, 8, loss=20)
    sync(paths, name)
    shown = READERS[name](paths.root, temp_data)
    assert shown.keys() == {"train/loss", "validation/loss"}
    repeated = 20 if name == "tensorboard" else 10  # the others cannot take rows back
    losses = [11, 12, *(repeated + step for step in (3, 4, 5)), 26, 27, 28]
    assert shown["train/loss"] == list(zip(range(1, 9), losses, strict=True))
    assert [step for step, _ in shown["validation/loss"] if step > 2] == [4, 6, 8]
    assert math.isnan(dict(shown["validation/loss"])[4])
    if name != "tensorboard":
        assert sync(paths, name) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("prepared_data")
def test_trackers_match_metrics_after_crash_and_resume(
    tiny: RunConfig, temp_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "FINISH_S", 600)  # whatever else this machine does
    config = with_train(tiny, trackers=("tensorboard", "wandb"))
    run_until(config, 7, monkeypatch)
    root = run(config)
    for name in config.train.trackers:
        shown = READERS[name](root, temp_data)
        expected = [(row["step"], pytest.approx(row["loss"])) for row in train_rows(root)]
        assert shown["train/loss"] == expected
        assert [step for step, _ in shown["validation/loss"]] == [0, 6, 12]
        assert {"train/lr", "train/grad_norm", "train/tokens_per_s", "cloze/acc"} <= shown.keys()
        assert f"tracker {name} failed" not in (root / "log.txt").read_text()


@pytest.mark.usefixtures("prepared_data")
def test_failing_tracker_logs_once(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cannot write its files, and one has a server that never answers."""
    paths = RunPaths.of("tiny")
    paths.root.mkdir(parents=True)
    paths.tensorboard.write_text("in the way")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(background, "FINISH_S", 0.5)
        root = run(with_train(tiny, trackers=("tensorboard", "mlflow")))
    assert len(train_rows(root)) == 12
    log = (root / "log.txt").read_text()
    assert log.count("the tracker tensorboard failed: ") == 1
    assert log.count("the tracker mlflow failed: ") == 1
    assert "myllm runs sync tiny --to tensorboard" in log


def test_concurrent_sync_raises(tiny: RunConfig) -> None:
    from myllm.files import file_lock

    paths = RunPaths.of("tiny")
    paths.trackers.mkdir(parents=True)
    with file_lock(paths.trackers / "wandb.lock"), pytest.raises(UserError, match="another process sends"):
        sync(paths, "wandb")


def test_missing_package_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("myllm.runs.trackers.destinations.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_installed(("wandb",))


def test_sync_command_on_finished_run(tiny: RunConfig, temp_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = RunPaths.of("tiny")
    paths.root.mkdir(parents=True)
    write_rows(paths, 1, 3, loss=10)
    main(["runs", "sync", "tiny", "--to", "tensorboard"])
    main(["runs", "sync", "tiny", "--to", "tensorboard"])
    assert capsys.readouterr().out.startswith("4 rows sent to tensorboard: tensorboard --logdir ")
    assert READERS["tensorboard"](paths.root, temp_data)["train/loss"] == [(1, 11), (2, 12), (3, 13)]
