"""Shared by the tests of publishing: a Hub with an account, and a run that needs no training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_server import HubServer
from support.published_run import TOKEN, write_run

from myllm.config import RunConfig
from myllm.hub import publish as publishing
from myllm.paths import RunPaths
from myllm.runs.history import Metrics, Row


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on which this process and its children have an account."""
    with HubServer() as server, server.reached(monkeypatch, tmp_path / "hf"):
        server.models.add_account(TOKEN, "someone", "a-group")
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf/token").write_text(TOKEN)  # as `hf auth login` writes it
        yield server


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, ours or the client's."""
    monkeypatch.setattr(publishing, "RETRY_DELAYS_S", (0, 0))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture
def run(tiny: RunConfig) -> RunPaths:
    return write_run(tiny)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces drawing, which is slow."""

    def draw(metrics: Metrics, config: Row, folder: Path) -> dict[str, Path]:
        folder.mkdir()
        (folder / "loss.png").write_bytes(b"\x89PNG of %d rows" % len(metrics.train))
        return {"loss": folder / "loss.png"}

    monkeypatch.setattr("myllm.runs.report.plots.save_figures", draw)
