"""Uploads to the local stand-in for the Hub with the real client: what a commit needs, and what makes it fail."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from support.hub_server import HubServer

REPO = "someone/model"
WEIGHTS = bytes(range(256)) * 4_000
FILES = {"README.md": b"---\nlibrary_name: transformers\n---\n# A model\n", "model.safetensors": WEIGHTS}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server, server.reached(monkeypatch, tmp_path / "hf"):
        server.models.add_account("hf_someone", "someone", "a-group")
        server.models.add_account("hf_reader", "someone", role="read")
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(hub.endpoint, token="hf_someone")


def commit(api: HfApi, files: dict[str, bytes], title: str = "Add", **settings: object) -> str:
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return api.create_commit(REPO, operations, commit_message=title, **settings).oid


def test_create_commit_and_tag(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    assert api.whoami()["name"] == "someone"
    assert api.create_repo(REPO, private=True).repo_id == REPO
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert hub.models.private == {REPO}
    sha = commit(api, FILES)
    api.create_tag(REPO, tag="first", revision=sha)
    api.create_tag(REPO, tag="first", exist_ok=True)
    second = commit(api, FILES | {"README.md": FILES["README.md"] + b"More.\n"}, "Say more", parent_commit=sha)
    assert len(hub.seen("/lfs/", "PUT")) == 1  # existing files are not uploaded again
    assert commit(api, {"model.safetensors": WEIGHTS}) == second  # nothing has changed
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["Say more", "Add", "initial commit"]
    refs = api.list_repo_refs(REPO)
    assert ([(tag.name, tag.target_commit) for tag in refs.tags], refs.branches[0].target_commit) == (
        [("first", sha)], second,
    )  # fmt: skip
    folder = Path(snapshot_download(REPO, revision="first", local_dir=tmp_path / "first", endpoint=hub.endpoint))
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert hub.models.files(REPO, "first").keys() == FILES.keys() | {".gitattributes"}


def test_multipart_upload_of_large_files(hub: HubServer, api: HfApi) -> None:
    hub.models.part_bytes = 300_000
    api.create_repo(REPO)
    hub.fail_next("/lfs/.*/2", method="PUT")
    commit(api, FILES)
    assert hub.models.files(REPO)["model.safetensors"] == WEIGHTS
    assert len(hub.seen("/lfs/", "PUT")) == 5  # four parts, one of them twice


def test_interrupted_upload_restarts(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    hub.cut_next("/lfs/", 100_000, method="PUT")
    commit(api, FILES)
    assert hub.models.files(REPO)["model.safetensors"] == WEIGHTS
    assert [request.received_bytes for request in hub.seen("/lfs/", "PUT")] == [100_000, len(WEIGHTS)]


def test_write_access_errors(hub: HubServer, api: HfApi) -> None:
    api.create_repo("a-group/model")
    for token, repo, status in (("hf_nobody", REPO, 401), ("hf_someone", "other/model", 403), ("hf_reader", REPO, 403)):
        with pytest.raises(HfHubHTTPError) as caught:
            HfApi(hub.endpoint, token=token).create_repo(repo, exist_ok=True)
        assert caught.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="Repository"):
        commit(api, FILES)


def test_stale_parent_and_lost_response(hub: HubServer, api: HfApi) -> None:
    """The client sends a commit only once: the caller has to find out whether it succeeded."""
    api.create_repo(REPO)
    first = api.repo_info(REPO).sha
    hub.lose_next("/commit/")
    with pytest.raises(Exception, match="disconnected"):
        commit(api, FILES, "Lost")
    assert hub.models.titles(REPO) == ["Lost", "initial commit"]
    with pytest.raises(HfHubHTTPError) as caught:
        commit(api, {"more.bin": WEIGHTS[:99]}, parent_commit=first)
    assert caught.value.response.status_code == 412
