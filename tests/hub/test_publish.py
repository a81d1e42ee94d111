"""Publishing a run on the loopback Hub: what arrives, whatever gets in between, and what is refused."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.hub_server import HubServer
from support.published_run import REPO, STEPS, TOKEN, save_checkpoint
from support.stand_in_export import make_folder

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
def _undrawn(undrawn: None) -> None:
    """Only the card's own tests draw."""


def publish(run: RunPaths, hub: HubConfig = HUB) -> list[str]:
    said: list[str] = []
    publishing.publish(run, select_checkpoints(run, hub.every_checkpoint), hub, make_folder, said.append)
    return said


def test_the_newest_checkpoint_with_all_that_belongs_to_it(hub: HubServer, run: RunPaths) -> None:
    said = publish(run, replace(HUB, private=True, license="mit"))
    assert said[-1] == f"published step 12: {hub.endpoint}/{REPO} (revision step-12)"
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
    assert json.loads(run.published.read_text()) == {"repo": REPO, "published": hub.models.tags(REPO)}
    assert not (run.root / ".publishing").exists()


def test_again_there_is_nothing_to_do(hub: HubServer, run: RunPaths) -> None:
    publish(run)
    run.published.unlink()  # only the Hub is believed
    hub.requests.clear()
    assert publish(run) == [f"{REPO} has step 12 already"]
    assert not [one for one in hub.requests if one.method != "GET"]
    assert json.loads(run.published.read_text())["published"] == hub.models.tags(REPO)


def test_every_checkpoint_is_a_revision(hub: HubServer, run: RunPaths) -> None:
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


def test_an_older_step_never_takes_the_place_of_a_newer_one(hub: HubServer, run: RunPaths) -> None:
    publish(run)
    said = publish(run, replace(HUB, every_checkpoint=True))
    assert [line.split(" is older")[0] for line in said] == ["step 4", "step 8", f"{REPO} has step 12 already"]
    assert list(hub.models.tags(REPO)) == ["step-12"]


FAULTS = {
    "an upload is cut": lambda hub: hub.cut_next("/lfs/", 50_000, method="PUT", times=2),
    "more cuts than the client bears": lambda hub: hub.cut_next("/lfs/", 50_000, method="PUT", times=7),
    "storage fails": lambda hub: hub.fail_next("/lfs/", method="PUT", status=500, times=7),
    "too many requests": lambda hub: hub.fail_next("/commit/", status=429, method="POST", retry_after=1),
    "a conflict": lambda hub: hub.fail_next("/commit/", status=409, method="POST"),
    "the answer to a commit is lost": lambda hub: hub.lose_next("/commit/"),
    "a commit fails": lambda hub: hub.fail_next("/commit/", status=503, method="POST"),
    "a tag fails": lambda hub: hub.fail_next("/tag/", status=502, method="POST"),
    "the answer to a tag is lost": lambda hub: hub.lose_next("/tag/"),
    "a listing fails": lambda hub: hub.fail_next("/refs", status=504),
    "making the repository fails": lambda hub: hub.fail_next("/repos/create", status=500, method="POST"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_time_and_nothing_else(fault: str, hub: HubServer, run: RunPaths, quick: None) -> None:
    FAULTS[fault](hub)
    publish(run)
    assert len(hub.models.titles(REPO)) == 2  # never two commits of a step
    assert list(hub.models.tags(REPO)) == ["step-12"]
    assert (
        hub.models.files(REPO)["model.safetensors"]
        == (select_checkpoints(run, False)[0] / "weights/__0_0.distcp").read_bytes()
    )


def test_retry_after_is_kept_to(hub: HubServer, run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(publishing.time, "sleep", waits.append)
    hub.fail_next("/commit/", status=429, method="POST", retry_after=77)
    said = publish(run)
    assert waits == [77]
    assert said[1] == f"publishing to {REPO}: the Hub answered 429 (asked to fail); again in 77 s"


def test_after_an_outage_the_same_command_goes_on(hub: HubServer, run: RunPaths, quick: None) -> None:
    hub.fail_next("/commit/", status=503, method="POST", times=3)
    with pytest.raises(UserError, match="the Hub answered 503"):
        publish(run)
    assert hub.models.titles(REPO) == ["initial commit"]
    assert not (run.root / ".publishing").exists()
    publish(run)
    assert list(hub.models.tags(REPO)) == ["step-12"]
    assert len(hub.seen("/lfs/", "PUT")) == 2  # the weights once, and the picture


def test_a_kill_between_commit_and_tag(hub: HubServer, run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
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
    [("hf_wrong", REPO, "does not know this token"), (TOKEN, "other/tiny", "belongs to other")],
)
def test_no_second_try_where_it_is_no_use(
    token: str, repo: str, message: str, hub: HubServer, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message):
        publish(run, HubConfig(repo))
    assert len(hub.requests) <= 3


def test_other_weights_of_that_step_are_left_alone(hub: HubServer, run: RunPaths, tiny: RunConfig) -> None:
    publish(run)
    before = hub.models.files(REPO)
    save_checkpoint(run, tiny, 12, scale=2.0)
    with pytest.raises(UserError, match=r"has a revision step-12 already, of other weights \(Step 12 of tiny"):
        publish(run)
    assert hub.models.files(REPO) == before


def test_a_checkpoint_that_is_removed_meanwhile_is_passed_over(hub: HubServer, run: RunPaths) -> None:
    chosen = select_checkpoints(run, True)
    shutil.rmtree(chosen[0])
    said: list[str] = []
    publishing.publish(run, chosen[:2], HUB, make_folder, said.append)
    assert said[0] == "step 4 was removed before it could be published"
    assert list(hub.models.tags(REPO)) == ["step-8"]


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("how", ["cut short", "changed"])
def test_a_damaged_checkpoint_is_passed_over(hub: HubServer, run: RunPaths, every: bool, how: str) -> None:
    """It is seen before or while it is read; without every checkpoint, the one before takes its place."""
    newest = run.checkpoints / "step_00000012/weights/__0_0.distcp"
    content = newest.read_bytes()
    newest.write_bytes(content[:-9] if how == "cut short" else content[:-9] + b"!" * 9)

    def make(folder: Path, to: Path) -> None:
        load_checkpoint(folder, HASH_MODEL)
        make_folder(folder, to)

    said: list[str] = []
    wanted = replace(HUB, every_checkpoint=every)
    publishing.publish(run, select_checkpoints(run, every), wanted, make, said.append)
    assert list(hub.models.tags(REPO)) == (["step-4", "step-8"] if every else ["step-8"])
    assert sum("step_00000012 is not an intact checkpoint: " in line and "passed over" in line for line in said) == 1
    for step in (4, 8):
        (run.checkpoints / f"step_{step:08d}/state.json").write_text("{")
    with pytest.raises(UserError, match=r"no intact checkpoint|is intact; nothing was published"):
        publishing.publish(run, select_checkpoints(run, every), wanted, make, said.append)


def test_one_at_a_time(hub: HubServer, run: RunPaths) -> None:
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
    monkeypatch.setattr(publishing, "export_checkpoint", make_folder)


def test_the_command(hub: HubServer, run: RunPaths, exported: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("tiny", "--repo", "a-group/other", "--every-checkpoint") == 0
    assert list(hub.models.tags("a-group/other")) == [f"step-{step}" for step in STEPS]
    assert f"{hub.endpoint}/a-group/other" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny"], "where to? Give --repo NAMESPACE/NAME"),
        (["tiny", "--repo", "alone"], "--repo 'alone' is not the name of a repository on the Hub"),
        (["tiny", "--repo", REPO, "--license", "My License"], "--license 'My License'"),
        (["nothing", "--repo", REPO], "runs with checkpoints: tiny"),
    ],
)
def test_mistakes(
    words: list[str], message: str, hub: HubServer, run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words) == 2
    assert message in capsys.readouterr().err
    assert hub.requests == []


def test_without_an_account_or_a_network(
    hub: HubServer, run: RunPaths, exported: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert command("tiny", "--repo", REPO) == 2
    said = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set: unset it" in said
    assert "Nothing is lost: the same command goes on" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(run.root / "nothing"))
    assert command("tiny", "--repo", REPO) == 2
    assert "no token is known here: log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


def test_the_token_is_in_no_file_and_no_line(
    hub: HubServer, run: RunPaths, exported: None, quick: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even from a server that sends it back."""
    for status, times in ((503, 3), (403, 1)):
        hub.fail_next("/commit/", status=status, times=times, method="POST", message=f"Bearer {TOKEN} is not welcome")
        assert command("tiny", "--repo", REPO) == 2
    said = capfd.readouterr()
    assert "(token) is not welcome" in said.out
    assert "(token) is not welcome" in said.err
    assert command("tiny", "--repo", REPO) == 0
    assert any(TOKEN in (one.authorization or "") for one in hub.requests)
    written = [path.read_bytes() for path in run.root.rglob("*") if path.is_file()]
    sent = hub.models.files(REPO).values()
    said = capfd.readouterr()
    assert not [text for text in (*written, *sent, said.out.encode(), said.err.encode()) if TOKEN.encode() in text]
