"""Publishing in the background: training never waits or fails for it, and what is left is published later."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest
import torch
from conftest import launch, losses, with_train, write_run_config
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id
from support.hub_server import HubServer
from support.processes import with_words
from support.published_run import REPO, TOKEN, hub_config, save_checkpoint
from support.stand_in_export import export_stand_in
from transformers import AutoModelForCausalLM, AutoTokenizer

from myllm.checkpoint.layout import step_of
from myllm.cli.launch import parse_args
from myllm.config import HubConfig, RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.errors import UserError
from myllm.hub import background_publish
from myllm.hub import publish as publishing
from myllm.hub.background_publish import background_publisher, check_hub_access, publish_from_queue
from myllm.hub.publish import select_checkpoints
from myllm.inference.load import load_model
from myllm.paths import RunPaths
from myllm.planning.config_checks import hub_errors
from myllm.training.loop import train


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def trained(config: RunConfig, on_checkpoint: Callable[[int], None] = lambda step: None) -> Path:
    with process_group("cpu") as process:
        return train(config, prepare(config.data, progress=False), process, on_checkpoint).run.root


def publishers() -> list[psutil.Process]:
    return with_words(psutil.Process().children(), "spawn_main")


def test_publishes_only_final_checkpoint_by_default(
    hub: HubServer, run: RunPaths, tiny: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    run.metrics.unlink()  # no figures: drawing is slow
    with background_publisher(hub_config(tiny), True, export_stand_in) as publisher:
        publisher.submit(4)
        assert hub.requests == []
        assert publishers() == []
        publisher.finish(12)
    assert list(hub.models.tags(REPO)) == ["step-12"]
    output = capfd.readouterr().out
    assert f"=== Publishing: {REPO}" in output
    assert f"published step 12: {hub.endpoint}/{REPO} (revision step-12)" in output
    assert publishers() == []


@pytest.mark.parametrize(("repo", "active"), [(None, True), (REPO, False)])
def test_inactive_without_repo_or_on_other_ranks(
    repo: str | None, active: bool, hub: HubServer, run: RunPaths, tiny: RunConfig
) -> None:
    config = hub_config(tiny, every_checkpoint=True)
    with background_publisher(
        replace(config, hub=replace(config.hub, repo=repo)), active, export_stand_in
    ) as publisher:
        publisher.submit(4)
        publisher.finish(12)
        assert publishers() == []
    assert hub.requests == []


def test_hub_outage_does_not_affect_training(
    hub: HubServer,
    tiny: RunConfig,
    no_figures: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The Hub drops all connections; the end of training waits up to a limit, and a later command resumes."""
    trained(replace(tiny, name="undisturbed"))
    hub.down(None)
    config = hub_config(tiny, every_checkpoint=True)
    with background_publisher(config, True, export_stand_in) as publisher:
        root = trained(config, publisher.submit)
        publisher.finish(12, limit_s=3)
    assert publishers() == []
    assert losses(root) == losses(RunPaths.of("undisturbed").root)
    output = capfd.readouterr().out
    assert "not published within" in output
    assert f"Nothing is lost: the checkpoints are in {root / 'checkpoints'}" in output
    assert f"myllm publish tiny --repo {REPO}" in output
    hub.up()
    run = RunPaths(root)
    publishing.publish(run, select_checkpoints(run, True), config.hub, export_stand_in, print)
    assert list(hub.models.tags(REPO)) == ["step-4", "step-8", "step-12"]


def test_killed_publisher_restarts(hub: HubServer, run: RunPaths, tiny: RunConfig) -> None:
    """Killed during an upload: then each submitted step is published once."""
    run.metrics.unlink()  # no figures: drawing is slow
    save_checkpoint(run, tiny, 16)
    hub.hold("/lfs/", 1_000)
    with background_publisher(hub_config(tiny, every_checkpoint=True), True, export_stand_in) as publisher:
        publisher.submit(4)
        wait_for(lambda: [request for request in hub.seen("/lfs/", "PUT") if request.received_bytes])
        (process,) = publishers()
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)  # reaping it is the publisher's job
        hub.release()
        publisher.finish(12)
    assert list(hub.models.tags(REPO)) == ["step-4", "step-8", "step-12"]
    assert len(hub.models.titles(REPO)) == 4
    assert not (run.root / ".publishing").exists()


def test_failed_run_does_not_wait_for_upload(hub: HubServer, run: RunPaths, tiny: RunConfig) -> None:
    run.metrics.unlink()
    hub.hold("/lfs/", 1_000)
    config = hub_config(tiny, every_checkpoint=True)

    def die() -> None:
        with background_publisher(config, True, export_stand_in) as publisher:
            publisher.submit(4)
            wait_for(lambda: hub.seen("/lfs/", "PUT"))
            raise UserError("the disk is full")

    with pytest.raises(UserError):
        die()
    assert publishers() == []
    assert hub.models.tags(REPO) == {}


def test_next_checkpoint_retries_failed_publish(
    hub: HubServer, run: RunPaths, tiny: RunConfig, no_figures: None
) -> None:
    log: list[str] = []
    attempts: list[int] = []

    def export(checkpoint: Path, folder: Path) -> None:
        attempts.append(step_of(checkpoint))
        if len(attempts) == 1:
            raise UserError("no space left")
        if len(attempts) == 2:
            raise ZeroDivisionError(f"a fault that tells the token {TOKEN}")
        export_stand_in(checkpoint, folder)

    config = hub_config(tiny, every_checkpoint=True).hub
    for step, expected in ((4, False), (8, False), (12, True)):
        steps: SimpleQueue[int | None] = SimpleQueue()
        for item in (step, None):
            steps.put(item)
        assert publish_from_queue(run, config, export, steps, log.append) is expected
    assert log[0] == "publishing stopped for now: no space left"
    assert log[1] == "publishing failed: ZeroDivisionError: a fault that tells the token (token)"
    assert attempts == [4, 4, 4, 8, 12]
    assert list(hub.models.tags(REPO)) == ["step-4", "step-8", "step-12"]


# -- before training starts -------------------------------------------------------------------------------------------


def test_missing_write_access_raises_before_training(
    hub: HubServer, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_hub_access(hub_config(tiny).hub)
    with pytest.raises(UserError, match="it needs write access to repositories of other"):
        check_hub_access(replace(hub_config(tiny).hub, repo="other/tiny"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="the Hub rejected the access token"):
        check_hub_access(hub_config(tiny).hub)


def test_training_starts_when_hub_is_unreachable(
    hub: HubServer, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    hub.down()
    check_hub_access(hub_config(tiny).hub, log.append)
    assert log == ["the Hub answered 503 (down for maintenance); training starts, and publishing is tried again later"]
    answers = threading.Event()
    monkeypatch.setattr(background_publish, "create_repo", lambda _: answers.wait())
    monkeypatch.setattr(background_publish, "ACCESS_CHECK_TIMEOUT_S", 0)
    check_hub_access(hub_config(tiny).hub, log.append)
    answers.set()
    assert log[1].startswith("the Hub did not answer within 0 s; training starts")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hub.repo", "alone"], "hub.repo 'alone' is not a repository name"),
        (["--hub.repo", "me/a--b"], "hub.repo 'me/a--b'"),
        (["--hub.private"], "hub.private without hub.repo"),
        (["--hub.repo", REPO, "--hub.license", "My own"], "hub.license 'My own'"),
    ],
)
def test_invalid_settings_are_rejected(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(["debug", *words])


@pytest.mark.parametrize("repo", [REPO, "a/b", "A.b/c_d-e", "a/b.git", "a/.b", "a-/b", "a/b--c", "a..b/c"])
def test_repo_names_match_hub_validation(repo: str) -> None:
    try:
        validate_repo_id(repo)
        expected = True
    except ValueError:
        expected = False
    assert (hub_errors(HubConfig(repo), "") == []) is expected


def test_missing_token_prevents_training(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temp_data: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = launch("--config", write_run_config(hub_config(tiny), tmp_path / "config.json"))
    assert done.returncode == 2
    assert "no access token was found" in done.stderr
    assert not temp_data.exists()


@pytest.mark.slow
def test_end_to_end_offline(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temp_data: Path) -> None:
    """A token but no network, as on many clusters: the run finishes, and its last lines say how to publish it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = write_run_config(hub_config(tiny), tmp_path / "config.json")
    done = launch("--config", config)
    assert done.returncode == 0, done.stderr
    assert len(losses(temp_data / "runs/tiny")) == 12
    assert "HF_HUB_OFFLINE is set: unset it, or publish from a machine with a network; training starts" in done.stdout
    assert "publishing stopped for now: HF_HUB_OFFLINE is set" in done.stdout
    assert f"myllm publish tiny --repo {REPO}" in done.stdout.split("not published: see above")[1]
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in temp_data.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.slow
def test_end_to_end(hub: HubServer, tiny: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """From the training command to a user who has transformers and the name of the repository."""
    every_six = with_train(tiny, save_every_steps=6)
    config = write_run_config(hub_config(every_six, every_checkpoint=True), tmp_path / "config.json")
    done = launch("--config", config, timeout=900)  # two exports, in a process that gives way to all others
    assert done.returncode == 0, done.stderr
    assert f"=== Publishing: {REPO}" in done.stdout
    assert "published step 12" in done.stdout, done.stdout
    assert b"| cloze |" in hub.models.files(REPO)["README.md"]  # evaluated at the last step, before publishing
    assert list(hub.models.tags(REPO)) == ["step-6", "step-12"]
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in temp_data.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    for revision in ("step-6", "main"):
        folder = snapshot_download(REPO, revision=revision, local_dir=tmp_path / revision)
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        step = 6 if revision == "step-6" else 12
        ours, tokenizer = load_model(temp_data / f"runs/tiny/checkpoints/step_{step:08d}", "cpu")
        ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("the river ran under")["input_ids"]])
        assert ids[0, 1:].tolist() == list(tokenizer.encode("the river ran under"))
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, ours(ids)[..., : theirs.config.vocab_size])


def test_unsupported_architecture_raises_before_training(tiny: RunConfig) -> None:
    publishing.check_export(tiny.model)
    with pytest.raises(UserError, match="no architecture of transformers supports this model"):
        publishing.check_export(replace(tiny.model, activation="gelu"))
