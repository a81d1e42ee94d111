"""Publishing beside training: the loop never waits and never fails for it, and what is left undone is done later."""

import os
import signal
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
from support.published_run import REPO, TOKEN, hub_config, save_checkpoint
from support.stand_in_export import make_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from myllm.checkpoint.retention import step_of
from myllm.cli.launch import parse_args
from myllm.config import HubConfig, RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.errors import UserError
from myllm.hub import background_publish as publish_beside
from myllm.hub import publish as publishing
from myllm.hub.background_publish import background_publisher, check_hub_access, publish_from_queue
from myllm.hub.publish import select_checkpoints
from myllm.inference.load import load_model
from myllm.paths import RunPaths
from myllm.planning.validation import hub_errors
from myllm.training.loop import train


@pytest.fixture(autouse=True)
def _deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish_beside, "FINISH_TIMEOUT_S", 90)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def trained(config: RunConfig, on_checkpoint: Callable[[int], None] = lambda step: None) -> Path:
    with process_group("cpu") as process:
        return train(config, prepare(config.data, progress=False), process, on_checkpoint).run.root


def publishers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_without_every_checkpoint_only_the_end_is_published(
    hub: HubServer, run: RunPaths, tiny: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    run.metrics.unlink()  # nothing to draw, which takes long
    with background_publisher(hub_config(tiny), True, make_folder) as publisher:
        publisher.submit(4)
        assert hub.requests == []
        assert publishers() == []
        publisher.finish(12)
    assert list(hub.models.tags(REPO)) == ["step-12"]
    said = capfd.readouterr().out
    assert f"=== Publishing: {REPO}" in said
    assert f"published step 12: {hub.endpoint}/{REPO} (revision step-12)" in said
    assert publishers() == []


@pytest.mark.parametrize(("repo", "active"), [(None, True), (REPO, False)])
def test_nothing_is_done_where_nothing_is_asked(
    repo: str | None, active: bool, hub: HubServer, run: RunPaths, tiny: RunConfig
) -> None:
    config = hub_config(tiny, every_checkpoint=True)
    with background_publisher(replace(config, hub=replace(config.hub, repo=repo)), active, make_folder) as publisher:
        publisher.submit(4)
        publisher.finish(12)
        assert publishers() == []
    assert hub.requests == []


def test_an_outage_costs_training_nothing_and_the_next_command_goes_on(
    hub: HubServer, tiny: RunConfig, undrawn: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The Hub hangs up all the time; the end waits so long and no longer."""
    trained(replace(tiny, name="undisturbed"))
    hub.down(None)
    monkeypatch.setattr(publish_beside, "FINISH_TIMEOUT_S", 3)
    config = hub_config(tiny, every_checkpoint=True)
    with background_publisher(config, True, make_folder) as publisher:
        root = trained(config, publisher.submit)
        publisher.finish(12)
    assert publishers() == []
    assert losses(root) == losses(RunPaths.of("undisturbed").root)
    said = capfd.readouterr().out
    assert "not published within" in said
    assert f"Nothing is lost: the checkpoints are in {root / 'checkpoints'}" in said
    assert f"myllm publish tiny --repo {REPO}" in said
    hub.up()
    run = RunPaths(root)
    publishing.publish(run, select_checkpoints(run, True), config.hub, make_folder, print)
    assert list(hub.models.tags(REPO)) == ["step-4", "step-8", "step-12"]


def test_a_killed_publisher_is_started_again(hub: HubServer, run: RunPaths, tiny: RunConfig) -> None:
    """Killed in the middle of an upload; then each step is there once, and none that was not offered."""
    run.metrics.unlink()  # nothing to draw, which takes long
    save_checkpoint(run, tiny, 16)
    hub.hold("/lfs/", 1_000)
    with background_publisher(hub_config(tiny, every_checkpoint=True), True, make_folder) as publisher:
        publisher.submit(4)
        wait_for(lambda: [one for one in hub.seen("/lfs/", "PUT") if one.received_bytes])
        (process,) = publishers()
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)  # reaping it is the publisher's own business
        hub.release()
        publisher.finish(12)
    assert list(hub.models.tags(REPO)) == ["step-4", "step-8", "step-12"]
    assert len(hub.models.titles(REPO)) == 4
    assert not (run.root / ".publishing").exists()


def test_a_run_that_ends_early_does_not_wait_for_its_upload(
    hub: HubServer, run: RunPaths, tiny: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    run.metrics.unlink()
    hub.hold("/lfs/", 1_000)
    config = hub_config(tiny, every_checkpoint=True)

    def die() -> None:
        with background_publisher(config, True, make_folder) as publisher:
            publisher.submit(4)
            wait_for(lambda: hub.seen("/lfs/", "PUT"))
            raise UserError("the disk is full")

    with pytest.raises(UserError):
        die()
    assert publishers() == []
    assert hub.models.tags(REPO) == {}


def test_a_fault_is_said_and_the_next_checkpoint_tries_again(
    hub: HubServer, run: RunPaths, tiny: RunConfig, undrawn: None
) -> None:
    said: list[str] = []
    tries: list[int] = []

    def make(checkpoint: Path, folder: Path) -> None:
        tries.append(step_of(checkpoint))
        if len(tries) == 1:
            raise UserError("no room for it")
        if len(tries) == 2:
            raise ZeroDivisionError(f"a fault that tells the token {TOKEN}")
        make_folder(checkpoint, folder)

    config = hub_config(tiny, every_checkpoint=True).hub
    for step, fine in ((4, False), (8, False), (12, True)):
        steps: SimpleQueue[int | None] = SimpleQueue()
        for offered in (step, None):
            steps.put(offered)
        assert publish_from_queue(run, config, make, steps, said.append) is fine
    assert said[0] == "publishing gives up for now: no room for it"
    assert said[1] == "publishing failed: ZeroDivisionError: a fault that tells the token (token)"
    assert tries == [4, 4, 4, 8, 12]
    assert list(hub.models.tags(REPO)) == ["step-4", "step-8", "step-12"]


# -- before training starts -------------------------------------------------------------------------------------------


def test_who_may_not_write_learns_it_at_once(hub: HubServer, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    check_hub_access(hub_config(tiny).hub)
    with pytest.raises(UserError, match="it needs write access to what belongs to other"):
        check_hub_access(replace(hub_config(tiny).hub, repo="other/tiny"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="the Hub does not know this token"):
        check_hub_access(hub_config(tiny).hub)


def test_a_hub_that_is_away_is_no_obstacle(hub: HubServer, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    hub.down()
    check_hub_access(hub_config(tiny).hub, said.append)
    assert said == ["the Hub answered 503 (down for maintenance); training starts, and publishing is tried again later"]
    hub.up()
    monkeypatch.setattr(publish_beside, "ACCESS_CHECK_TIMEOUT_S", 0)
    check_hub_access(hub_config(tiny).hub, said.append)
    assert said[1].startswith("the Hub did not answer within 0 s; training starts")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hub.repo", "alone"], "hub.repo 'alone' is not the name of a repository"),
        (["--hub.repo", "me/a--b"], "hub.repo 'me/a--b'"),
        (["--hub.private"], "hub.private without hub.repo"),
        (["--hub.repo", REPO, "--hub.license", "My own"], "hub.license 'My own'"),
    ],
)
def test_mistakes_are_found_with_all_others(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(["debug", *words])


@pytest.mark.parametrize("repo", [REPO, "a/b", "A.b/c_d-e", "a/b.git", "a/.b", "a-/b", "a/b--c", "a..b/c"])
def test_the_clients_own_rules_for_names_are_ours(repo: str) -> None:
    try:
        validate_repo_id(repo)
        expected = True
    except ValueError:
        expected = False
    assert (hub_errors(HubConfig(repo), "") == []) is expected


def test_training_does_not_start_without_a_token(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temp_data: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = launch("--config", write_run_config(hub_config(tiny), tmp_path / "config.json"))
    assert done.returncode == 2
    assert "no token is known here" in done.stderr
    assert not temp_data.exists()


@pytest.mark.slow
def test_the_whole_way_without_a_network(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temp_data: Path
) -> None:
    """A cluster's machine: an account, but no way out. The run is whole, and its last lines say what to type where."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = write_run_config(hub_config(tiny), tmp_path / "config.json")
    done = launch("--config", config)
    assert done.returncode == 0, done.stderr
    assert len(losses(temp_data / "runs/tiny")) == 12
    assert "HF_HUB_OFFLINE is set: unset it, or publish from a machine with a network; training starts" in done.stdout
    assert "publishing gives up for now: HF_HUB_OFFLINE is set" in done.stdout
    assert f"myllm publish tiny --repo {REPO}" in done.stdout.split("not published: see above")[1]
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in temp_data.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.slow
def test_the_whole_way(hub: HubServer, tiny: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """From the command to a stranger who has only transformers and the name of the repository."""
    every_six = with_train(tiny, save_every_steps=6)
    config = write_run_config(hub_config(every_six, every_checkpoint=True), tmp_path / "config.json")
    done = launch("--config", config)
    assert done.returncode == 0, done.stderr
    assert f"=== Publishing: {REPO}" in done.stdout
    assert "published step 12" in done.stdout
    assert b"| cloze |" in hub.models.files(REPO)["README.md"]  # measured at the last step, before it was published
    assert list(hub.models.tags(REPO)) == ["step-6", "step-12"]
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in temp_data.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    for revision in ("step-6", "main"):
        got = snapshot_download(REPO, revision=revision, local_dir=tmp_path / revision)
        theirs = AutoModelForCausalLM.from_pretrained(got).eval()
        step = 6 if revision == "step-6" else 12
        ours, tokenizer = load_model(temp_data / f"runs/tiny/checkpoints/step_{step:08d}", "cpu")
        ids = torch.tensor([AutoTokenizer.from_pretrained(got)("the river ran under")["input_ids"]])
        assert ids[0, 1:].tolist() == list(tokenizer.encode("the river ran under"))
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, ours(ids)[..., : theirs.config.vocab_size])


def test_a_model_without_a_counterpart_is_refused_before_training(tiny: RunConfig) -> None:
    publishing.check_export(tiny.model)
    with pytest.raises(UserError, match="no architecture of transformers computes what this model does"):
        publishing.check_export(replace(tiny.model, activation="relu2"))
