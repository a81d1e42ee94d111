"""What a preparation and a training show in a notebook: the messages of a real kernel, as a browser would get them."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT, tiny_config, with_train, write_run_config
from nbclient import NotebookClient
from test_notebooks import PATIENCE

from myllm.distributed.terminal import in_notebook

WIDGET = "application/vnd.jupyter.widget-view+json"
START = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from myllm.config import DataConfig, RunConfig, load_config
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.training.loop import train
config = load_config(Path({config!r}), RunConfig())
"""
PREPARE = "dataset = prepare(config.data)"
TRAIN = """
with process_group("cpu") as dist:
    train(config, dataset, dist)
"""
INTERRUPT = """
with process_group("cpu") as dist:
    endless = replace(config, name="interrupted", train=replace(config.train, max_steps=1_000_000))
    outcome = train(endless, dataset, dist, on_checkpoint=lambda step: os.kill(os.getpid(), signal.SIGINT))
print("stopped by", outcome.stopped_by, "after step", outcome.step)
"""
WITHOUT_WIDGETS = """
sys.modules["ipywidgets"] = None  # as if it were not installed
config = replace(config, name="lines", data=replace(config.data, val_tokens=2_000))
dataset = prepare(config.data)
with process_group("cpu") as dist:
    train(config, dataset, dist)
"""


class Recorder(NotebookClient):
    """Keeps the messages of each cell."""

    messages: dict[int, list[dict[str, Any]]]

    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        self.messages.setdefault(cell_index, []).append(msg)
        return super().process_message(msg, cell, cell_index)


@pytest.fixture(scope="module")
def cells(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("notebook")
    config = write_run_config(with_train(tiny_config(corpus), save_every_steps=8), folder / "tiny.json")
    sources = [START.format(config=str(config)), PREPARE, TRAIN, INTERRUPT, WITHOUT_WIDGETS]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = Recorder(notebook, **PATIENCE, kernel_name="python3")
    client.messages = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYLLM_DATA", str(folder / "data"))
        patch.setenv("PYTHONPATH", str(ROOT / "src"))
        client.execute()
    return [client.messages[number] for number in range(len(sources))]


def shown_and_closed(messages: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The widgets that a cell displays, and those of them that it removes."""
    of_type = {
        kind: [m["content"] for m in messages if m["msg_type"] == kind] for kind in ("display_data", "comm_close")
    }
    shown = [content["data"][WIDGET]["model_id"] for content in of_type["display_data"]]
    return shown, [content["comm_id"] for content in of_type["comm_close"] if content["comm_id"] in shown]


def text(messages: list[dict[str, Any]]) -> str:
    return "".join(message["content"]["text"] for message in messages if message["msg_type"] == "stream")


@pytest.mark.parametrize(
    ("number", "expected"), [(1, "preparing files-"), (2, "ended: complete"), (3, "stopped by 2 after")]
)
def test_progress_bar_is_removed_when_done(cells: list[list[dict[str, Any]]], number: int, expected: str) -> None:
    shown, closed = shown_and_closed(cells[number])
    assert len(shown) == 1
    assert closed == shown
    assert expected in text(cells[number])
    assert "\r" not in text(cells[number])


def test_progress_bar_updates(cells: list[list[dict[str, Any]]]) -> None:
    updates = [m["content"]["data"] for m in cells[2] if m["msg_type"] == "comm_msg"]
    values = [update["state"]["value"] for update in updates if "value" in update.get("state", {})]
    assert any("loss" in value for value in values if isinstance(value, str))
    assert max(value for value in values if isinstance(value, int | float)) == 12


def test_plain_lines_without_ipywidgets(cells: list[list[dict[str, Any]]]) -> None:
    assert not [message for message in cells[4] if message["msg_type"] in ("display_data", "comm_open")]
    lines = text(cells[4]).splitlines()
    assert [line for line in lines if line.startswith("step     12/12 ")]
    assert "\r" not in text(cells[4])
    assert "█" not in text(cells[4])


def test_importing_ipykernel_does_not_make_a_notebook() -> None:
    import ipykernel  # noqa: F401 (as tools that run notebooks do)

    assert not in_notebook()
