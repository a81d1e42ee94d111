"""Where a run's newest checkpoint is damaged, whatever reads the run says so; and no file is hashed without need."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from support.saved_checkpoints import SMALL, Save, rewrite

from myllm import files
from myllm.checkpoint import integrity
from myllm.cli import main as cli
from myllm.hub.export import verify as parity
from myllm.hub.export.source import load_export_source
from myllm.hub.export.transformers import export_transformers
from myllm.inference import chat
from myllm.inference.load import load_model
from myllm.inference.server import http as server

MODEL_FILES = {"weights/.metadata", "weights/__0_0.distcp", "state.json", "config.json", "tokenizer.json"}


@pytest.fixture
def newest(save: Save) -> Path:
    """Of the run `made`, which has an older one too."""
    older = save(SMALL)
    newer = shutil.copytree(older, older.with_name("step_00000009"))
    rewrite(newer, "state.json", {"step": 9})
    return newer


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of a checkpoint was hashed, by its path within the checkpoint."""
    counts: Counter[str] = Counter()

    def count(path: Path) -> str:
        folder = next(parent for parent in path.parents if parent.name.startswith("step_"))
        counts[path.relative_to(folder).as_posix()] += 1
        return files.file_sha256(path)

    monkeypatch.setattr(integrity, "file_sha256", count)
    return counts


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers says of an export is of no interest here."""
    monkeypatch.setattr("myllm.hub.export.transformers.verify", lambda *_: parity.Parity(0, 0, 1, 0))


def damage(folder: Path) -> str:
    path = folder / "weights/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"warning: skipping {folder}: the content of weights/__0_0.distcp has changed\n"


COMMANDS = {
    "sample": ["--prompt", "the river", "--max-new-tokens", "2", "--device", "cpu"],
    "chat": ["--device", "cpu"],
    "serve": ["--device", "cpu", "--port", "0"],
    "eval": ["--tasks", "generation", "--device", "cpu"],
    "export": ["--to", "exported"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_warn_about_damaged_checkpoint(
    command: str, newest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "chat", lambda *_: None)
    monkeypatch.setattr(server.PageServer, "serve_forever", lambda *_: None)
    warning = damage(newest)
    cli.main([command, "made", *COMMANDS[command]])
    assert capsys.readouterr().err.count(warning) == 1


def test_model_files_hashed_once(
    newest: Path, hashed: Counter[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And neither the optimizer nor random state: nothing reads them."""
    load_model("made", "cpu")
    assert hashed == dict.fromkeys(MODEL_FILES, 1)
    for number, call in enumerate((
        lambda: cli.main(["eval", "made", "--tasks", "generation", "--device", "cpu"]),
        lambda: cli.main(["export", "made", "--to", str(tmp_path / "exported")]),
        lambda: export_transformers(newest, tmp_path / "exported", say=lambda _: None),
        lambda: load_export_source(newest),
        lambda: load_model(newest, "cpu"),
    )):  # fmt: skip
        hashed.clear()
        call()
        assert hashed == dict.fromkeys(MODEL_FILES, 1), number
    hashed.clear()
    cli.main(["checkpoint", "list", "made"])
    assert not hashed
    cli.main(["checkpoint", "verify", "made"])
    assert set(hashed) > MODEL_FILES
    assert set(hashed.values()) == {2}  # two checkpoints
    capsys.readouterr()


def test_unread_files_checked_by_size(newest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy that was cut short is seen by the sizes of its files."""
    (newest / "optimizer/.metadata").write_bytes(b"short")
    load_model("made", "cpu")
    assert "skipping" in capsys.readouterr().err
    cli.main(["checkpoint", "list", "made"])
    assert "optimizer/.metadata has 5 bytes, expected" in capsys.readouterr().out
