"""Checkpoints: what goes in comes out, damage of any kind is seen, and a failed save costs nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from myllm import checkpoint
from myllm.checkpoint import TrainState, list_checkpoints, load, load_latest, save, verify
from myllm.data.order import DataPosition
from myllm.errors import UserError


def put(folder: Path, step: int, keep_last: int = 0, tokenizer_file: Path | None = None) -> Path:
    torch.manual_seed(step)
    state = TrainState(step, step * 10, DataPosition(1, step, 7, "abc"))
    model = {"w": torch.randn(5, 3), "b": torch.randn(3)}
    optimizer = {"w": {"step": torch.tensor(3.0), "exp_avg": torch.randn(5, 3)}}
    random = [checkpoint.random_state(torch.device("cpu"))]
    return save(folder, state, {"name": "x"}, model, optimizer, random, keep_last, tokenizer_file)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    loaded = load(put(tmp_path, 5))
    torch.manual_seed(5)
    assert loaded.state == TrainState(5, 50, DataPosition(1, 5, 7, "abc"))
    assert loaded.config == {"name": "x"}
    assert torch.equal(loaded.model["w"], torch.randn(5, 3))
    assert loaded.optimizer["w"]["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]  # no temporary folder stays


def test_the_vocabulary_goes_with_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes('{"é": "\r\n"}\n'.encode())
    assert load(put(tmp_path / "plain", 1)).tokenizer_file is None
    folder = put(tmp_path / "own", 1, tokenizer_file=file)
    carried = load(folder).tokenizer_file
    assert carried == folder / "tokenizer.json"
    assert carried.read_bytes() == file.read_bytes()
    file.unlink()  # it needs the original no more
    assert not list(verify(folder))
    carried.write_bytes(b"{}")
    assert any("tokenizer.json" in fault for fault in verify(folder))
    carried.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        load(folder)


def test_random_state_continues_the_sequence(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = checkpoint.random_state(torch.device("cpu"))
    expected = torch.rand(4)
    torch.manual_seed(2)
    checkpoint.restore_random_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "random.pt", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_seen_by_content(tmp_path: Path, name: str, damage: str) -> None:
    put(tmp_path, 1)
    path = put(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    said: list[str] = []
    found = load_latest(tmp_path, said.append)
    assert found is not None
    assert found.state.step == 1
    assert len(said) == 1
    assert name in said[0]
    with pytest.raises(UserError, match="not an intact checkpoint"):
        load(path.parent)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": "other", "files": {}}', '{"files": 3}'])
def test_a_manifest_that_is_none(tmp_path: Path, content: str | None) -> None:
    folder = put(tmp_path, 1)
    if content is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(content)
    assert list(verify(folder))
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact; .*--train\.fresh"):
        load_latest(tmp_path, lambda _: None)


def test_a_truncated_manifest_that_names_no_files_is_not_trusted(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({"format": manifest["format"], "files": {}}))
    assert list(verify(folder))


def test_nothing_there(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none", lambda _: None) is None


def test_a_failed_save_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(UserError, match=r"no room to save step 2.*older checkpoints are untouched"):
        put(tmp_path, 2, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert load_latest(tmp_path, print).state.step == 1


def test_a_partial_folder_of_a_killed_save_is_no_checkpoint(tmp_path: Path) -> None:
    good = put(tmp_path, 1)
    shutil.copytree(good, tmp_path / ".partial-step_00000002")
    assert list_checkpoints(tmp_path) == [good]
    put(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_old_ones_go_once_the_new_one_is_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        put(tmp_path, step, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000004", "step_00000003"]


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    """A pickle that would call something is refused even with a manifest that vouches for it."""

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "owned",))

    folder = put(tmp_path, 1)
    torch.save({"w": Hostile()}, folder / "model.pt")
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(checkpoint._manifest(folder)))
    with pytest.raises(Exception, match="Weights only load failed"):
        load(folder)
    assert not (tmp_path / "owned").exists()


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from myllm.checkpoint import TrainState, random_state, save
from myllm.data.order import DataPosition
from myllm.errors import UserError

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # a write beyond 1 MiB fails, as on a full disk
state = TrainState(2, 0, DataPosition(0, 0, 0, ""))
try:
    save(Path(sys.argv[1]), state, {}, {"w": torch.randn(1 << 20)}, {}, [random_state(torch.device("cpu"))], 1)
except UserError as error:
    sys.exit(str(error))
"""


def test_a_write_that_fails_half_way(tmp_path: Path) -> None:
    """In a process of its own whose files may not grow: torch hides the reason in its error's context."""
    put(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=False)
    assert "no room to save step 2" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert not list(verify(tmp_path / "step_00000001"))


def test_a_damaged_newer_checkpoint_does_not_crowd_out_sound_ones(tmp_path: Path) -> None:
    (put(tmp_path, 9) / "model.pt").write_bytes(b"")
    for step in (1, 2, 3):
        put(tmp_path, step, keep_last=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000009", "step_00000003"]
    assert load_latest(tmp_path, lambda _: None).state.step == 3
