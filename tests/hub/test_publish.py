"""Publishing a run on a local stand-in for the Hub: what arrives, what interrupts it, and what is rejected."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.hub_server import HubServer
from support.published_run import REPO, STEPS, TOKEN, save_checkpoint
from support.stand_in_export import export_stand_in

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.integrity import HASH_MODEL
from myllm.cli import main as cli
from myllm.config import HubConfig, RunConfig
from myllm.errors import UserError
from myllm.files import file_lock
from myllm.hub import publish as publishing
from myllm.hub.publish import select_checkpoints
from myllm.paths import RunPaths

HUB = HubConfig(REPO)


@pytest.fixture(autouse=True)
def _no_figures(no_figures: None) -> None:
    """Drawing is tested with the card and the report."""


def publish(run: RunPaths, hub: HubConfig = HUB) -> list[str]:
    """Publish what `hub` says; the lines that were logged."""
    log: list[str] = []
    publishing.publish(run, select_checkpoints(run, hub.every_checkpoint), hub, export_stand_in, log.append)
    return log


def test_publishes_newest_checkpoint_and_files(hub: HubServer, run: RunPaths) -> None:
    log = publish(run, replace(HUB, private=True, license="mit"))
    assert log[-1] == f"published step 12: {hub.endpoint}/{REPO} (revision step-12)"
    assert hub.models.private == {REPO}
    assert list(hub.models.tags(REPO)) == ["step-12"]
    files = hub.models.files(REPO, "step-12")
    assert files["model.safetensors"] == (select_checkpoints(run, False)[0] / "weights/__0_0.distcp").read_bytes()
    assert files.keys() >= {"config.json", "tokenizer.json", "README.md", "plots/loss.png", "training/config.json"}
    assert files["plots/loss.png"].startswith(b"\x89PNG")
    assert b"license: mit" in files["README.md"]
    assert len(files["training/metrics.jsonl"].splitlines()) == 12 + 6
    assert json.loads(files["training/environment.json"])["command"][-1] == "files:texts"
    assert b"/home/me" not in b"".join(files.values())
    assert list(hub.models.tags(REPO)) == ["step-12"]
    assert not (run.root / ".publishing").exists()


def test_publishing_twice_is_idempotent(hub: HubServer, run: RunPaths) -> None:
    publish(run)
    hub.requests.clear()
    assert publish(run) == [f"{REPO} already has step 12"]
    assert not [request for request in hub.requests if request.method != "GET"]
    assert list(hub.models.tags(REPO)) == ["step-12"]


def test_every_checkpoint_becomes_revision(hub: HubServer, run: RunPaths) -> None:
    publish(run, replace(HUB, every_checkpoint=True))
    assert list(hub.models.tags(REPO)) == ["step-4", "step-8", "step-12"]
    assert [title.split(" (")[0] for title in hub.models.titles(REPO)] == [
        "Step 12 of tiny", "Step 8 of tiny", "Step 4 of tiny", "initial commit"
    ]  # fmt: skip
    old = hub.models.files(REPO, "step-4")
    assert {json.loads(line)["step"] for line in old["training/metrics.jsonl"].splitlines()} == {1, 2, 3, 4}
    assert b"This revision is step 4 of 12" in old["README.md"]
    assert b"at step 4" in old["README.md"]
    assert b"at step 12" not in old["README.md"]


def test_older_step_never_replaces_newer(hub: HubServer, run: RunPaths) -> None:
    publish(run)
    log = publish(run, replace(HUB, every_checkpoint=True))
    assert [line.split(" is older")[0] for line in log] == ["step 4", "step 8", f"{REPO} already has step 12"]
    assert list(hub.models.tags(REPO)) == ["step-12"]


FAULTS = {
    "an upload is cut": lambda hub: hub.cut_next("/lfs/", 50_000, method="PUT", times=2),
    "more cuts than the client retries": lambda hub: hub.cut_next("/lfs/", 50_000, method="PUT", times=7),
    "storage fails": lambda hub: hub.fail_next("/lfs/", method="PUT", status=500, times=7),
    "too many requests": lambda hub: hub.fail_next("/commit/", status=429, method="POST", retry_after=1),
    "a conflict": lambda hub: hub.fail_next("/commit/", status=409, method="POST"),
    "the answer to a commit is lost": lambda hub: hub.lose_next("/commit/"),
    "a commit fails": lambda hub: hub.fail_next("/commit/", status=503, method="POST"),
    "a tag fails": lambda hub: hub.fail_next("/tag/", status=502, method="POST"),
    "the answer to a tag is lost": lambda hub: hub.lose_next("/tag/"),
    "a listing fails": lambda hub: hub.fail_next("/refs", status=504),
    "creating the repository fails": lambda hub: hub.fail_next("/repos/create", status=500, method="POST"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_transient_faults_are_retried(fault: str, hub: HubServer, run: RunPaths, no_waiting: None) -> None:
    FAULTS[fault](hub)
    publish(run)
    assert len(hub.models.titles(REPO)) == 2  # never two commits for a step
    assert list(hub.models.tags(REPO)) == ["step-12"]
    assert (
        hub.models.files(REPO)["model.safetensors"]
        == (select_checkpoints(run, False)[0] / "weights/__0_0.distcp").read_bytes()
    )


def test_retry_after_is_respected(hub: HubServer, run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(publishing.time, "sleep", waits.append)
    hub.fail_next("/commit/", status=429, method="POST", retry_after=77)
    log = publish(run)
    assert waits == [77]
    assert log[1] == f"publishing to {REPO}: the Hub answered 429 (asked to fail); retrying in 77 s"


def test_publishing_resumes_after_outage(hub: HubServer, run: RunPaths, no_waiting: None) -> None:
    hub.fail_next("/commit/", status=503, method="POST", times=3)
    with pytest.raises(UserError, match="the Hub answered 503"):
        publish(run)
    assert hub.models.titles(REPO) == ["initial commit"]
    assert not (run.root / ".publishing").exists()
    publish(run)
    assert list(hub.models.tags(REPO)) == ["step-12"]
    assert len(hub.seen("/lfs/", "PUT")) == 2  # the weights once, and the figure


def test_interrupt_between_commit_and_tag(hub: HubServer, run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.create_tag", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish(run)
    assert hub.models.tags(REPO) == {}
    monkeypatch.undo()
    with hub.reached(monkeypatch, Path(os.environ.get("HF_HOME", run.root))):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        publish(run)
    assert (len(hub.models.titles(REPO)), list(hub.models.tags(REPO))) == (2, ["step-12"])


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [("hf_wrong", REPO, "rejected the access token"), (TOKEN, "other/tiny", "repositories of other")],
)
def test_permanent_errors_are_not_retried(
    token: str, repo: str, message: str, hub: HubServer, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message):
        publish(run, HubConfig(repo))
    assert len(hub.requests) <= 3


def test_conflicting_weights_of_same_step_raise(hub: HubServer, run: RunPaths, tiny: RunConfig) -> None:
    publish(run)
    before = hub.models.files(REPO)
    save_checkpoint(run, tiny, 12, scale=2.0)
    with pytest.raises(UserError, match=r"already has a revision step-12 with other weights \(Step 12 of tiny"):
        publish(run)
    assert hub.models.files(REPO) == before


def test_removed_checkpoint_is_skipped(hub: HubServer, run: RunPaths) -> None:
    checkpoints = select_checkpoints(run, True)
    shutil.rmtree(checkpoints[0])
    log: list[str] = []
    publishing.publish(run, checkpoints[:2], HUB, export_stand_in, log.append)
    assert log[0] == "step 4 was removed before it could be published"
    assert list(hub.models.tags(REPO)) == ["step-8"]


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("how", ["cut short", "changed"])
def test_damaged_checkpoint_is_skipped(hub: HubServer, run: RunPaths, every: bool, how: str) -> None:
    """Damage is noticed before or while reading; without every_checkpoint the next older one is published."""
    newest = run.checkpoints / "step_00000012/weights/__0_0.distcp"
    content = newest.read_bytes()
    newest.write_bytes(content[:-9] if how == "cut short" else content[:-9] + b"!" * 9)

    def export(checkpoint: Path, folder: Path) -> None:
        load_checkpoint(checkpoint, HASH_MODEL)
        export_stand_in(checkpoint, folder)

    log: list[str] = []
    settings = replace(HUB, every_checkpoint=every)
    publishing.publish(run, select_checkpoints(run, every), settings, export, log.append)
    assert list(hub.models.tags(REPO)) == (["step-4", "step-8"] if every else ["step-8"])
    assert sum("step_00000012 is not an intact checkpoint: " in line and "skipped" in line for line in log) == 1
    for step in (4, 8):
        (run.checkpoints / f"step_{step:08d}/state.json").write_text("{")
    with pytest.raises(UserError, match=r"no intact checkpoint|is intact; nothing was published"):
        publishing.publish(run, select_checkpoints(run, every), settings, export, log.append)


def test_concurrent_publishing_raises(hub: HubServer, run: RunPaths) -> None:
    with file_lock(run.root / ".publish.lock"), pytest.raises(UserError, match="another process is publishing"):
        publish(run)


# -- the command ------------------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    try:
        cli.main(["publish", *words])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "export_checkpoint", export_stand_in)


def test_publish_command(hub: HubServer, run: RunPaths, exported: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("tiny", "--repo", "a-group/other", "--every-checkpoint") == 0
    assert list(hub.models.tags("a-group/other")) == [f"step-{step}" for step in STEPS]
    assert f"{hub.endpoint}/a-group/other" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny"], "missing --repo NAMESPACE/NAME"),
        (["tiny", "--repo", "alone"], "--repo 'alone' is not a repository name"),
        (["tiny", "--repo", REPO, "--license", "My License"], "--license 'My License'"),
        (["nothing", "--repo", REPO], "runs with checkpoints: tiny"),
    ],
)
def test_invalid_arguments(
    words: list[str], message: str, hub: HubServer, run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words) == 2
    assert message in capsys.readouterr().err
    assert hub.requests == []


def test_missing_network_or_token_fails(
    hub: HubServer, run: RunPaths, exported: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert command("tiny", "--repo", REPO) == 2
    output = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set: unset it" in output
    assert "Nothing is lost: rerun the same command" in output
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(run.root / "nothing"))
    assert command("tiny", "--repo", REPO) == 2
    assert "no access token was found: log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


def test_token_never_leaks(
    hub: HubServer, run: RunPaths, exported: None, no_waiting: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even if the server sends it back."""
    for status, times in ((503, 3), (403, 1)):
        hub.fail_next("/commit/", status=status, times=times, method="POST", message=f"Bearer {TOKEN} is not welcome")
        assert command("tiny", "--repo", REPO) == 2
    output = capfd.readouterr()
    assert "(token) is not welcome" in output.out
    assert "(token) is not welcome" in output.err
    assert command("tiny", "--repo", REPO) == 0
    assert any(TOKEN in (request.authorization or "") for request in hub.requests)
    run_files = [path.read_bytes() for path in run.root.rglob("*") if path.is_file()]
    sent = hub.models.files(REPO).values()
    output = capfd.readouterr()
    assert not [
        text for text in (*run_files, *sent, output.out.encode(), output.err.encode()) if TOKEN.encode() in text
    ]
