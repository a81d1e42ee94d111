"""Checkpoints: what goes in comes out, damage of any kind is seen, and a failed save costs nothing."""

import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorStorageMetadata

from myllm.checkpoint import format as checkpoint
from myllm.checkpoint import retention
from myllm.checkpoint.dcp import flatten_moments, read_into, read_moments, write_tensors
from myllm.checkpoint.format import Snapshot, load_checkpoint, load_latest, write_checkpoint
from myllm.checkpoint.integrity import verify_checkpoint
from myllm.checkpoint.layout import OPTIMIZER, list_checkpoints, step_of
from myllm.checkpoint.retention import (
    RetentionPolicy,
    check_space_for_run,
    check_space_for_save,
    remaining_checkpoint_bytes,
)
from myllm.checkpoint.rng import get_rng_state, set_rng_state
from myllm.checkpoint.state import TrainState, read_state
from myllm.cli import main as cli
from myllm.config import OptimConfig, RunConfig, TrainConfig
from myllm.data.sampler import DataPosition
from myllm.errors import UserError
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.planning.disk import SPARE_BYTES, checkpoint_bytes, disk_estimate_bytes, n_kept, n_saves, save_due
from myllm.planning.flops import stored_parameters

KILLS = Path(__file__).parents[1] / "support/kill_inside_saves.py"


def put(folder: Path, step: int, keep_last: int = 0, tokenizer_file: Path | None = None) -> Path:
    torch.manual_seed(step)
    state = TrainState(step, step * 10, DataPosition(1, step, 7, "abc"))
    weights = {"w": torch.randn(5, 3), "b": torch.randn(3)}
    moments = {"w.step": torch.tensor(3.0), "w.exp_avg": torch.randn(5, 3)}
    random = {0: get_rng_state(torch.device("cpu"))}
    snapshot = Snapshot(state, {"name": "x"}, weights, moments, random, tokenizer_file)
    return write_checkpoint(folder, snapshot, RetentionPolicy(keep_last))


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    loaded = load_checkpoint(put(tmp_path, 5))
    torch.manual_seed(5)
    assert loaded.state == TrainState(5, 50, DataPosition(1, 5, 7, "abc"))
    assert loaded.config == {"name": "x"}
    assert torch.equal(loaded.model["w"], torch.randn(5, 3))
    assert loaded.optimizer["w"]["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]  # no temporary folder stays


def test_tokenizer_file_saved_with_weights(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes('{"é": "\r\n"}\n'.encode())
    assert load_checkpoint(put(tmp_path / "plain", 1)).tokenizer_file is None
    folder = put(tmp_path / "own", 1, tokenizer_file=file)
    carried = load_checkpoint(folder).tokenizer_file
    assert carried == folder / "tokenizer.json"
    assert carried.read_bytes() == file.read_bytes()
    file.unlink()  # it needs the original no more
    assert not list(verify_checkpoint(folder))
    carried.write_bytes(b"{}")
    assert any("tokenizer.json" in fault for fault in verify_checkpoint(folder))
    carried.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        load_checkpoint(folder)


def test_rng_state_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = get_rng_state(torch.device("cpu"))
    expected = torch.rand(4)
    torch.manual_seed(2)
    set_rng_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected)


FILES = [
    *(f"{part}/{name}" for part in ("weights", "optimizer") for name in (".metadata", "__0_0.distcp")),
    *("random/rank_00000.pt", "state.json", "config.json"),
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_load_latest_skips_damaged_checkpoint(tmp_path: Path, name: str, damage: str) -> None:
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
    messages: list[str] = []
    found = load_latest(tmp_path, messages.append)
    assert found is not None
    assert found.state.step == 1
    assert len(messages) == 1
    assert name in messages[0]
    with pytest.raises(UserError, match="not an intact checkpoint"):
        load_checkpoint(tmp_path / "step_00000002")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": "other", "files": {}}', '{"files": 3}'])
def test_invalid_manifest_rejected(tmp_path: Path, content: str | None) -> None:
    folder = put(tmp_path, 1)
    if content is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(content)
    assert list(verify_checkpoint(folder))
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact; .*--train\.fresh"):
        load_latest(tmp_path, lambda _: None)


def test_manifest_without_files_rejected(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({"format": manifest["format"], "files": {}}))
    assert list(verify_checkpoint(folder))


def test_load_latest_without_checkpoints(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none", lambda _: None) is None


def test_failed_save_preserves_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(UserError, match=r"no space to save step 2.*older checkpoints are untouched"):
        put(tmp_path, 2, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert load_latest(tmp_path, print).state.step == 1


def test_partial_save_folder_ignored(tmp_path: Path) -> None:
    good = put(tmp_path, 1)
    shutil.copytree(good, tmp_path / ".partial-step_00000002")
    assert list_checkpoints(tmp_path) == [good]
    put(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_keep_last_removes_oldest_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        put(tmp_path, step, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000004", "step_00000003"]


class Hostile:
    """A pickle that would leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("part", ["weights/.metadata", "weights/__0_0.distcp", "optimizer/.metadata", "random"])
def test_hostile_pickle_cannot_execute_code(tmp_path: Path, part: str) -> None:
    """Pickles that would call something are refused even with a manifest that vouches for them."""
    folder = put(tmp_path, 1)
    owned = tmp_path / "owned"
    if part == "random":
        torch.save(Hostile(owned), folder / "random/rank_00000.pt")
    elif part.endswith(".metadata"):
        (folder / part).write_bytes(pickle.dumps(Hostile(owned)))
    else:  # in place of each tensor; the places are those of the metadata
        packed = io.BytesIO()
        torch.save(Hostile(owned), packed)
        metadata = FileSystemReader(folder / "weights").read_metadata()
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, packed.tell()
        (folder / part).write_bytes(packed.getvalue())
        (folder / "weights/.metadata").write_bytes(pickle.dumps(metadata))
    vouch(folder)
    opened = load_checkpoint(folder)
    with pytest.raises(Exception, match=r"Weights only load failed|which a checkpoint does not contain"):
        assert not [opened.model, opened.optimizer, opened.random]
    assert not owned.exists()


class AsPython3112Does:
    """An enum's member, or what somebody puts in its place, as `getattr(kind, name)`."""

    def __init__(self, kind: object, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return (getattr, (self.kind, self.name))


def test_checkpoint_from_python_3_11_2_loads(tmp_path: Path) -> None:
    """Debian's Python 3.11.2 writes the members of enums with `getattr`: that is taken, any other use is refused."""
    folder = put(tmp_path, 1)
    metadata = FileSystemReader(folder / "weights").read_metadata()
    weights, file = load_checkpoint(folder).model, folder / "weights/.metadata"
    for kind, name, fine in (
        (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT", True),
        (_MEM_FORMAT_ENCODING, "__class__", False),
        (TensorStorageMetadata, "__init__", False),
    ):
        metadata.storage_meta = AsPython3112Does(kind, name)
        file.write_bytes(pickle.dumps(metadata))
        vouch(folder)
        if fine:
            assert all(torch.equal(tensor, load_checkpoint(folder).model[key]) for key, tensor in weights.items())
        else:
            with pytest.raises(UserError, match="which a checkpoint does not contain"):
                assert load_checkpoint(folder).model


def vouch(folder: Path) -> None:
    """Write the manifest anew, over whatever is in the folder now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from myllm.checkpoint.format import Snapshot, write_checkpoint
from myllm.checkpoint.rng import get_rng_state
from myllm.checkpoint.state import TrainState
from myllm.data.sampler import DataPosition
from myllm.errors import UserError

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # a write beyond 1 MiB fails, as on a full disk
state, random = TrainState(2, 0, DataPosition(0, 0, 0, "")), {0: get_rng_state(torch.device("cpu"))}
try:
    write_checkpoint(Path(sys.argv[1]), Snapshot(state, {}, {"w": torch.randn(1 << 20)}, {}, random))
except UserError as error:
    sys.exit(str(error))
"""


def test_full_disk_leaves_older_checkpoint_intact(tmp_path: Path) -> None:
    """In a process of its own whose files may not grow: torch hides the reason in its error's context."""
    put(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=False)
    assert "no space to save step 2" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert not list(verify_checkpoint(tmp_path / "step_00000001"))


def test_killed_save_leaves_no_partial_checkpoint(tmp_path: Path) -> None:
    """A process ends before each fsync, rename and removal of a save, in turn: beside steps 1 and 2, and in place of a
    step 3 that is there already. What carries a final name is intact, and no step that was there is lost."""
    done = subprocess.run([sys.executable, KILLS, tmp_path], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for again in (False, True):
        ends = [row for row in rows if row.get("again") is again]
        assert len(ends) > 25
        assert ends[-1]["ended"] == 0
        assert ends[-1]["then"]["values"] == {"step_00000002": 2, "step_00000003": 3.5}
        for row in ends:
            assert not row["killed"]["faults"], row
            assert not row["then"]["others"], row
            newest = row["then"]["values"].get("step_00000003")
            assert newest in ((3, 3.5) if again else (None, 3.5)), row
            assert row["then"]["values"]["step_00000002"] == 2
        assert {row["then"]["values"].get("step_00000003") for row in ends} == {3 if again else None, 3.5}
    reached = {(row["before"], Path(row["of"]).name) for row in rows if "before" in row}
    assert {("rename", ".partial-step_00000003"), ("rename", "step_00000001"), ("rename", "step_00000003")} <= reached


def test_keep_every_steps_retains_checkpoints(tmp_path: Path) -> None:
    for step in range(2, 21, 2):
        torch.manual_seed(step)
        state, weights = TrainState(step, 0, DataPosition(0, 0, 0, "")), {"w": torch.randn(2)}
        checkpoint.write_checkpoint(
            tmp_path, Snapshot(state, {}, weights, {}, {}), RetentionPolicy(last=2, every_steps=6)
        )
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [20, 18, 12, 6]


def saved_and_kept(train: TrainConfig, here: list[int], step: int) -> tuple[int, int]:
    """By making every step of a run."""
    folders = list(here)
    saves = [at for at in range(step + 1, train.max_steps + 1) if save_due(train, at, at == train.max_steps)]
    for at in saves:
        folders.append(at)
        passing = folders[: -train.keep_last] if train.keep_last else []
        gone = {old for old in passing if not train.keep_every_steps or old % train.keep_every_steps}
        folders = [old for old in folders if old not in gone]
    return len(saves), len(folders)


@given(
    *(st.integers(least, most) for least, most in ((1, 60), (0, 20), (0, 20), (0, 8))),
    st.integers(0, 30), st.sets(st.integers(1, 30), max_size=4),
)  # fmt: skip
def test_save_and_keep_counts_match_simulation(
    most: int, save: int, keep: int, last: int, step: int, here: set[int]
) -> None:
    """One answer to what a run makes and keeps, for plan, preflight and the disk's room, as if each step were made."""
    train = TrainConfig(max_steps=most, save_every_steps=save, keep_every_steps=keep, keep_last=last)
    there = sorted(at for at in here if at <= step)
    saved, kept = saved_and_kept(train, there, step)
    assert n_saves(train, step, most) == saved
    if saved:
        assert n_kept(train, there, step) == kept


def test_checkpoint_counts_of_long_runs(tmp_path: Path) -> None:
    train = TrainConfig(max_steps=3_000, save_every_steps=1_000, keep_every_steps=1_500, keep_last=0)
    config = RunConfig(train=train)
    one = disk_estimate_bytes(config)["checkpoints"] // 5
    assert one == checkpoint_bytes(config)
    assert remaining_checkpoint_bytes(config, tmp_path, tmp_path, 0)[1] == 5
    for last, kept in ((0, 10**12 // 2 + 10**12 // 7 - 10**12 // 14), (10**11, 10**11 + (10**12 - 175 * 10**9) // 7)):
        long = replace(train, max_steps=10**12, save_every_steps=2, keep_every_steps=7, keep_last=last)
        assert abs(n_kept(long) - kept) <= 1
        assert remaining_checkpoint_bytes(RunConfig(train=long), tmp_path, tmp_path, 0)[1] == n_kept(long) + 1


def test_disk_space_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(train=TrainConfig(max_steps=1_000, save_every_steps=100, keep_last=2, keep_every_steps=300))
    one = stored_parameters(config.model) * 12 + SPARE_BYTES
    # At the end 300, 600, 900 and 1,000: keep_last 2 are the last two. One more while it is written.
    assert remaining_checkpoint_bytes(config, tmp_path, tmp_path / "best", 0) == (5 * one, 5)
    patient = replace(config, train=replace(config.train, early_stop_patience=3))
    assert remaining_checkpoint_bytes(patient, tmp_path, tmp_path / "best", 0) == (6 * one, 6)
    (tmp_path / "step_00000300").mkdir()  # there already
    assert remaining_checkpoint_bytes(config, tmp_path, tmp_path / "best", 300) == (4 * one, 4)
    assert remaining_checkpoint_bytes(config, tmp_path, tmp_path / "best", 1_000) == (0, 0)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(retention.shutil, "disk_usage", lambda _: usage(4 * one))
    check_space_for_run(patient, tmp_path / "elsewhere", tmp_path / "best", 1_000)
    with pytest.raises(UserError, match=r"needs 9\.1 GB for 5 .* has 7\.3 GB free; .*keep_every_steps 300.*MYLLM_DATA"):
        check_space_for_run(config, tmp_path / "none", tmp_path / "best", 0)
    monkeypatch.setattr(retention.shutil, "disk_usage", lambda _: usage(3_000_000))
    with pytest.raises(UserError, match=r"no space to save step 7 in .*needs 5\.0 MB, the disk has 3\.0 MB free"):
        check_space_for_save(tmp_path / "none", 7, 3_000_000)


def test_older_format_raises(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": "myllm-checkpoint-1"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"its format is .myllm-checkpoint-1., expected"):
        load_checkpoint(folder)


def test_mismatched_tensors_raise(tmp_path: Path) -> None:
    folder = put(tmp_path, 1) / "weights"
    for tensors in ({"w": torch.zeros(5, 3)}, {"w": torch.zeros(5, 4), "b": torch.zeros(3)}):
        with pytest.raises(UserError, match="do not fit this model: "):
            read_into(folder, tensors)


def test_moments_are_read_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take twice the memory of the weights, and a GPU that trains may not have that twice."""
    parameters = {"a": torch.nn.Parameter(torch.randn(3, 4)), "b": torch.nn.Parameter(torch.randn(5))}
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)

    def new_optimizer() -> ScheduledOptimizer:
        return ScheduledOptimizer(parameters.items(), {}, OptimConfig(), 10)

    saved, blank = new_optimizer(), list[torch.Tensor]()
    saved.step(0)
    write_tensors(tmp_path / OPTIMIZER, flatten_moments(saved.state_dict()))
    stepped, fresh = new_optimizer(), new_optimizer()
    for step in range(2):
        stepped.step(step)
    before = list(flatten_moments(stepped.state_dict()).values())
    zero_state = fresh.zero_state()
    monkeypatch.setattr(fresh, "zero_state", lambda: zero_state)
    blank += flatten_moments(zero_state).values()
    for optimizer, tensors in ((stepped, before), (fresh, blank)):
        read_moments(tmp_path, optimizer)
        found = flatten_moments(optimizer.state_dict())
        assert [tensor.data_ptr() for tensor in found.values()] == [tensor.data_ptr() for tensor in tensors]
        assert all(torch.equal(found[name], tensor) for name, tensor in flatten_moments(saved.state_dict()).items())


def test_same_state_writes_identical_bytes(tmp_path: Path) -> None:
    one, other = put(tmp_path / "one", 1), put(tmp_path / "other", 1)
    assert (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path))
    run = tmp_path / "runs/mine"
    for folder in ("checkpoints", "best"):
        put(run / folder, 5)
    damaged = put(run / "checkpoints", 10)
    (run / "metrics.jsonl").write_text('{"kind": "eval", "name": "validation", "step": 5, "loss": 3.25}\n')
    cli.main(["checkpoint", "verify", "mine"])
    assert capsys.readouterr().out.count(": intact") == 3
    (damaged / "optimizer/__0_0.distcp").unlink()
    cli.main(["checkpoint", "list", str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "tokens", "size", "validation", "loss", "where", "state"]
    assert lines[1].split() == ["5", "50", *lines[1].split()[2:4], "3.2500", "checkpoints", "intact"]
    assert lines[2].endswith("checkpoints  optimizer/__0_0.distcp is missing")
    assert lines[3].endswith("best         intact")
    cli.main(["checkpoint", "list", "mine", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["step"], row["validation_loss"], row["state"] == "intact") for row in rows] == [
        (5, 3.25, True), (10, None, False), (5, 3.25, True),
    ]  # fmt: skip
    for words, message in (
        (["verify", "mine"], f"1 damaged: {damaged}. Training resumes from the newest intact one"),
        (["verify", str(damaged)], "1 damaged"),
        (["list", "other"], "no checkpoint at 'other'; runs with checkpoints: mine"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["checkpoint", *words])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


# -- folders that somebody else named, or put something into


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name", ["step_00000002.bak", "step_best", "step_2 (copy)", "step_", "Step_00000003", "step_٣"]
)
def test_folders_without_step_names_ignored(tmp_path: Path, name: str) -> None:
    """It is neither the newest one, nor counted, nor ever removed."""
    shutil.copytree(put(tmp_path, 2), tmp_path / name)
    for step in (3, 4, 5):
        put(tmp_path, step, keep_last=1)
    assert names(tmp_path) == {"step_00000005", name}
    assert list_checkpoints(tmp_path) == [tmp_path / "step_00000005"]
    assert load_latest(tmp_path, print).state.step == 5
    assert not list(verify_checkpoint(tmp_path / name))


def test_checkpoints_sorted_by_step_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        put(tmp_path, step)
    shutil.copytree(put(tmp_path, 7), tmp_path / "step_7")
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == ["step_100000000", "step_99999999", "step_00000007", "step_7"]
    put(tmp_path, 100_000_001, keep_last=1)
    assert names(tmp_path) == {"step_100000001", "step_7"}  # the second is a copy that somebody made


def test_renamed_checkpoint_skipped_and_preserved(tmp_path: Path) -> None:
    """A renamed or copied folder is recognized by its state, skipped, and kept, even by a save there."""
    renamed = put(tmp_path, 3).rename(tmp_path / "step_00000099")
    shutil.copytree(put(tmp_path, 4), tmp_path / "step_00000002")
    (fault,) = verify_checkpoint(renamed)
    assert fault == "its name says step 99, but it contains step 3"
    messages: list[str] = []
    assert load_latest(tmp_path, messages.append).state.step == 4
    assert messages == [f"skipping {renamed}: {fault}"]
    put(tmp_path, 5, keep_last=1)
    assert names(tmp_path) == {"step_00000099", "step_00000002", "step_00000005"}
    put(tmp_path, 99, keep_last=1)
    moved = names(tmp_path) - {"step_00000002", "step_00000099"}
    assert [name.partition(".")[0] for name in moved] == ["step_00000099"]
    assert read_state(tmp_path / moved.pop()).step == 3
    assert load_latest(tmp_path, print).state.step == 99


def test_user_files_in_checkpoint_preserved(tmp_path: Path) -> None:
    noted, linked, plain = (put(tmp_path / "c", step) for step in (1, 2, 3))
    (noted / "notes.txt").write_text("the good one")
    (plain / ".DS_Store").touch()
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    for step in (4, 5):
        put(tmp_path / "c", step, keep_last=1)
    assert names(tmp_path / "c") == {noted.name, linked.name, "step_00000005"}
    put(tmp_path / "c", 1, keep_last=1)  # trained past again, after a restart from elsewhere
    assert [path.read_text() for path in (tmp_path / "c").glob("step_00000001.before-*/notes.txt")] == ["the good one"]
    (tmp_path / "c/.partial-mine").mkdir()
    (tmp_path / "c/.removed-step_00000009.bak").mkdir()
    (tmp_path / "c/.removed-step_00000009").mkdir()
    retention.clean_up_partial(tmp_path / "c")
    assert {".partial-mine", ".removed-step_00000009.bak"} <= names(tmp_path / "c")
    assert ".removed-step_00000009" not in names(tmp_path / "c")


def test_retention_ignores_damaged_newer_checkpoint(tmp_path: Path) -> None:
    (put(tmp_path, 9) / "weights/__0_0.distcp").write_bytes(b"")
    for step in (1, 2, 3):
        put(tmp_path, step, keep_last=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000009", "step_00000003"]
    assert load_latest(tmp_path, lambda _: None).state.step == 3
