"""The mirror: what is copied, what is taken for whole, and what becomes of failures."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import Empty
from typing import Any

import fsspec
import pytest
import torch
from conftest import losses
from support.gcs_server import GcsServer
from support.hub_server import HubServer
from support.s3_server import S3Server

from myllm.checkpoint.format import Snapshot, write_checkpoint
from myllm.checkpoint.integrity import verify_checkpoint
from myllm.checkpoint.layout import list_checkpoints, step_of
from myllm.checkpoint.retention import RetentionPolicy
from myllm.checkpoint.rng import get_rng_state
from myllm.checkpoint.state import TrainState
from myllm.cli.launch import parse_args
from myllm.config import CheckpointConfig, RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.data.sampler import DataPosition
from myllm.distributed.collectives import process_group
from myllm.errors import UserError
from myllm.paths import RunPaths
from myllm.runs.mirror.fetch import fetch_from_mirror
from myllm.runs.mirror.upload import background_mirror, mirror_from_queue
from myllm.training.loop import train

KEEP = RetentionPolicy(last=2, every_steps=100)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server(monkeypatch)
    yield server
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    server = GcsServer(monkeypatch)
    yield server
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    server.stop()


@pytest.fixture
def hf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """With a model repository to write to."""
    with HubServer() as hub, hub.reached(monkeypatch, tmp_path / "home"):
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        hub.models.add_account("hf_me", "me")
        hub.models.add("me/runs", {"README.md": b"# Runs"})
        yield hub
        fsspec.get_filesystem_class("hf").clear_instance_cache()


@pytest.fixture(params=["folder", "memory", "s3", "gs", "hf"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in ("s3", "gs", "hf"):
        request.getfixturevalue(request.param)
        return {"s3": "s3://bucket/runs", "gs": "gs://bucket/runs", "hf": "hf://me/runs"}[request.param]
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return "memory://runs"
    return str(folder_url(tmp_path))


def folder_url(tmp_path: Path) -> Path:
    (tmp_path / "mirror").mkdir()
    return tmp_path / "mirror"


@pytest.fixture
def run(temp_data: Path) -> RunPaths:
    run = RunPaths.of("mirrored [1]")  # a name that looks like a pattern
    run.root.mkdir(parents=True)
    run.metrics.write_text('{"kind": "train", "step": 1}\n')
    run.config.write_text("{}")
    return run


def put(checkpoints: Path, step: int, keep: RetentionPolicy = KEEP) -> Path:
    weights, moments = {"w": torch.full((500,), float(step))}, {"w.exp_avg": torch.zeros(500)}
    state = TrainState(step, 0, DataPosition(0, 0, 0, ""))
    snapshot = Snapshot(state, {}, weights, moments, {0: get_rng_state(torch.device("cpu"))})
    return write_checkpoint(checkpoints, snapshot, keep)


class Script:
    """A queue of steps, and of what happens between them; None as a number of seconds passes."""

    def __init__(self, *items: object) -> None:
        self._items = [*items, None]

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        item = self._items.pop(0)
        if callable(item):
            item()
            raise Empty
        return item

    def empty(self) -> bool:
        return True


def mirror(run: RunPaths, url: str | Path, *items: object) -> tuple[bool, list[str]]:
    log: list[str] = []
    return mirror_from_queue(run, str(url), KEEP, Script(*items), log.append), log


def new_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str = "new") -> None:
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path / name))


def fetch(name: str, url: str | Path, **changes: Any) -> tuple[list[int], list[str]]:
    """The steps on this machine after a fetch, newest first, and what was said."""
    log: list[str] = []
    config = RunConfig(name=name, checkpoint=CheckpointConfig(str(url)))
    fetch_from_mirror(replace(config, train=replace(config.train, **changes)), log.append)
    return [step_of(folder) for folder in list_checkpoints(RunPaths.of(name).checkpoints)], log


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_new_machine_fetches_newest_checkpoint(
    run: RunPaths, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(step: int) -> Callable[[], None]:
        return lambda: (put(run.checkpoints, step), None)[1]

    put(run.best, 99, RetentionPolicy(newest_only=True))
    success, log = mirror(run, url, 0, save(99), 99, save(100), 100, save(101), 101, save(102), 102)
    assert success
    assert [line.partition(" to ")[0] for line in log if "/checkpoints" in line] == [
        f"mirrored step {step}" for step in (99, 100, 101, 102)
    ]
    fs, base = fsspec.core.url_to_fs(url)
    names = {path.removeprefix(f"{base}/{run.root.name}/") for path in fs.find(base)}
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {
        "step_00000100", "step_00000101", "step_00000102"
    }  # fmt: skip
    assert {name for name in names if "/" not in name} - {"README.md"} == {"config.json", "metrics.jsonl"}
    newest, best = content(run.checkpoints / "step_00000102"), content(run.best)
    new_machine(tmp_path, monkeypatch)
    there = RunPaths.of(run.root.name)
    assert fetch(run.root.name, url)[0] == [102]
    assert content(there.checkpoints / "step_00000102") == newest
    assert content(there.best) == best
    assert there.metrics.read_bytes() == run.metrics.read_bytes()
    assert fetch(run.root.name, url)[1] == []  # there is nothing newer


def damage_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def flip(folder: Path) -> None:
    path = folder / "weights/__0_0.distcp"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), ""),
        (damage_manifest, ""),
        (lambda folder: (folder / "weights/__0_0.distcp").write_bytes(b"cut"), ""),
        (lambda folder: (folder / "optimizer/.metadata").unlink(), ""),
        (flip, "skipping step 2 of the mirror"),
    ],
)
def test_incomplete_or_damaged_newest_is_skipped(
    damage: Callable[[Path], None], message: str, run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = folder_url(tmp_path)
    put(run.checkpoints, 1), put(run.checkpoints, 2)
    mirror(run, url, 2)
    damage(url / run.root.name / "checkpoints/step_00000002")
    new_machine(tmp_path, monkeypatch)
    steps, log = fetch(run.root.name, url)
    assert steps == [1]
    assert not list(verify_checkpoint(RunPaths.of(run.root.name).checkpoints / "step_00000001"))
    assert message in " ".join(log)
    flip(url / run.root.name / "checkpoints/step_00000001")
    new_machine(tmp_path, monkeypatch, "third")
    if message:  # both are damaged, and the run must not start over
        with pytest.raises(UserError, match=r"no checkpoint in the mirror .* is intact"):
            fetch(run.root.name, url)


def test_newer_or_damaged_local_checkpoint(run: RunPaths, tmp_path: Path) -> None:
    url = folder_url(tmp_path)
    put(run.checkpoints, 1), put(run.checkpoints, 2)
    mirror(run, url, 2)
    run.metrics.write_text(run.metrics.read_text() + '{"kind": "train", "step": 2}\n')
    grown = run.metrics.read_text()
    flip(run.checkpoints / "step_00000002")
    assert fetch(run.root.name, url)[0] == [2, 1]
    assert not list(verify_checkpoint(run.checkpoints / "step_00000002"))
    assert run.metrics.read_text() == grown
    put(run.checkpoints, 3)
    assert fetch(run.root.name, url) == ([3, 2], [])


def test_full_disk_and_recovery_log_once(run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, copy = folder_url(tmp_path), shutil.copyfile

    def full(source: str, target: str) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    put(run.checkpoints, 1)
    success, log = mirror(
        run, url, 1, lambda: monkeypatch.setattr(shutil, "copyfile", full), lambda: put(run.checkpoints, 2), 2,
        lambda: None, lambda: monkeypatch.setattr(shutil, "copyfile", copy),
    )  # fmt: skip
    assert success
    assert [line.partition(" (")[0].replace(str(url), "URL") for line in log] == [
        f"mirrored step 1 to URL/{run.root.name}/checkpoints",
        "the mirror URL cannot be written: OSError: [Errno 28] No space left on device; training continues, and so do "
        "the attempts",
        f"mirrored step 2 to URL/{run.root.name}/checkpoints",
        "the mirror URL is up to date again",
    ]


def test_connection_loss_during_upload(
    run: RunPaths, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(run.checkpoints, 1)
    assert mirror(run, "s3://bucket", 1)[0]
    put(run.checkpoints, 2)

    def cut(received: bytes) -> bool:
        if b"PUT /bucket/" in received and b"step_00000002/optimizer" in received:
            s3.down()
        return False

    s3.hold = cut
    success, log = mirror(run, "s3://bucket", 2)
    assert not success
    assert len([line for line in log if "cannot be written" in line]) == 1
    s3.hold = lambda received: False
    s3.up()
    halves = {name for name in s3.names() if "step_00000002" in name}
    assert halves
    assert not any(name.endswith("manifest.json") for name in halves)
    home = tmp_path / "temp_data"
    new_machine(tmp_path, monkeypatch)
    assert fetch(run.root.name, "s3://bucket")[0] == [1]
    monkeypatch.setenv("MYLLM_DATA", str(home))
    assert mirror(run, "s3://bucket", 2)[0]
    assert fetch(run.root.name, "s3://bucket")[0] == [2, 1]


def test_hub_commit_rejection(run: RunPaths, hf: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "hf://me/runs"
    put(run.checkpoints, 1)
    assert mirror(run, url, 1)[0]
    put(run.checkpoints, 2)
    hf.fail_next("/commit/main", status=403, times=2, method="POST")  # also at the second attempt
    success, log = mirror(run, url, 2)
    assert not success
    assert len([line for line in log if "cannot be written" in line]) == 1
    home = tmp_path / "temp_data"
    new_machine(tmp_path, monkeypatch)
    assert fetch(run.root.name, url)[0] == [1]
    monkeypatch.setenv("MYLLM_DATA", str(home))
    assert mirror(run, url, 2)[0]
    new_machine(tmp_path, monkeypatch, "third")
    assert fetch(run.root.name, url)[0] == [2]


def test_unreadable_mirror_raises_without_local_checkpoint(run: RunPaths, s3: S3Server) -> None:
    s3.down()
    with pytest.raises(UserError, match="This machine has no checkpoint of the run, which would start over"):
        fetch(run.root.name, "s3://bucket")
    put(run.checkpoints, 1)
    steps, log = fetch(run.root.name, "s3://bucket")
    assert steps == [1]
    assert "the run resumes from its own checkpoints" in log[0]


def test_damaged_local_checkpoint_is_not_mirrored(run: RunPaths, tmp_path: Path) -> None:
    url = folder_url(tmp_path)
    put(run.checkpoints, 1)
    flip(put(run.checkpoints, 2))
    success, log = mirror(run, url, 2)
    assert success
    assert "step_00000002 is not mirrored: weights/__0_0.distcp is missing or has changed" in log[0]
    assert {path.parent.name for path in url.rglob("manifest.json")} == {"step_00000001"}


def test_fresh_run_rejects_existing_mirror(run: RunPaths, tmp_path: Path) -> None:
    url = folder_url(tmp_path)
    assert fetch(run.root.name, url, fresh=True)[1] == []
    put(run.checkpoints, 1)
    mirror(run, url, 1)
    with pytest.raises(UserError, match="Move or delete it there"):
        fetch(run.root.name, url, fresh=True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "checkpoint.mirror is empty"),
        ("nowhere://x", "Protocol not known: nowhere; expected s3://"),
        ("dropbox://x", "needs another package"),
        ("{tmp}/unmounted", "is not a folder; create it"),
        ("{tmp}/temp_data/runs", "is the folder of the runs themselves"),
    ],
)
def test_invalid_mirror_urls_raise(url: str, message: str, run: RunPaths, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(["debug", "--checkpoint.mirror", url.format(tmp=tmp_path)], fetch_from_mirror)


def test_resume_on_new_machine_matches_uninterrupted(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and with the curves from before."""

    def trained(config: RunConfig, on_checkpoint: Callable[[int], None] = lambda step: None) -> Path:
        with process_group("cpu") as process:
            return train(config, prepare(config.data, progress=False), process, on_checkpoint).run.root

    undisturbed = losses(trained(replace(tiny, name="undisturbed")))
    config = replace(tiny, checkpoint=CheckpointConfig(str(folder_url(tmp_path))))

    def box_goes_away(step: int) -> None:
        assert mirror(RunPaths.of("tiny"), config.checkpoint.mirror or "", step)[0]
        raise ConnectionAbortedError  # after the first one that is announced: fast steps may pass over some

    with pytest.raises(ConnectionAbortedError):
        trained(config, box_goes_away)
    new_machine(tmp_path, monkeypatch)
    fetch_from_mirror(config)
    root = trained(config)
    assert "resuming from" in (root / "log.txt").read_text()
    assert losses(root) == undisturbed


@pytest.mark.parametrize("url", ["folder", pytest.param("hf", marks=pytest.mark.slow)], indirect=True)
def test_background_mirror_finishes_last_checkpoint(run: RunPaths, url: str, capfd: pytest.CaptureFixture[str]) -> None:
    """By a process of its own, which has no bars or warnings to show."""
    config = RunConfig(name=run.root.name, checkpoint=CheckpointConfig(url))
    put(run.checkpoints, 1)
    with background_mirror(config, active=True) as process:
        process.submit(1)
        put(run.checkpoints, 2)
        process.finish(2)
    assert "mirrored step 2" in run.log.read_text()
    shown, errors = capfd.readouterr()
    assert "=== Mirroring" in shown
    assert "hffs-" not in errors
    assert "No files have been modified" not in errors
    fs, base = fsspec.core.url_to_fs(url)
    manifest = json.loads(fs.cat_file(f"{base}/{run.root.name}/checkpoints/step_00000002/manifest.json"))
    assert manifest["format"] == "myllm-checkpoint-2"
