"""The writing half of the loopback Hub: accounts, and models that are created, committed to and tagged.

    POST /api/repos/create                       409 where the repository is there already
    GET  /api/whoami-v2                          the account of a token
    POST /api/validate-yaml                      a model card's front matter
    POST /api/models/ID/preupload/REV            which files go to git and which to LFS
    POST /ID.git/info/lfs/objects/batch          where to put LFS objects; no address for what is there already
    PUT  /lfs/SHA256[/PART]                      the bytes, on the CDN's port, in one piece or in parts
    POST /lfs-complete/SHA256, /lfs-verify/...   after the parts; after all
    POST /api/models/ID/commit/REV               lines of JSON; 412 where the parent is not the newest commit
    GET  /api/models/ID/commits/REV, .../refs    what was committed and tagged
    POST /api/models/ID/tag/REV                  409 where the tag is there already

Writing needs a token of the repository's namespace: 401 without one, 403 with another's.

Source: huggingface_hub 2.4, hf_api.py, _commit_api.py and lfs.py.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from support.hub_replies import DATE, Blob, Commit, Reply, error_reply, json_reply

if TYPE_CHECKING:
    from support.hub_server import HubServer

REPO = r"(?P<repo>[^/]+/[^/]+)"
REGULAR = (".gitattributes", ".json", ".jsonl", ".md", ".py", ".txt", ".yaml")


@dataclass(frozen=True)
class Account:
    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"

    def may_write(self, repo: str) -> bool:
        return self.role == "write" and repo.split("/")[0] in (self.name, *self.orgs)


class Models:
    """The models of a HubServer. What a test looks at: `files`, `titles`, `tags`, `private`."""

    def __init__(self, hub: "HubServer") -> None:
        self.private: set[str] = set()
        self.part_bytes: int | None = None
        """Uploads of more than that come in parts."""
        self._hub = hub
        self._accounts: dict[str, Account] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        answers: dict[str, Callable[[re.Match[str], Account, bytes], Reply]] = {
            r"GET /api/whoami-v2": self._whoami,
            r"POST /api/validate-yaml": self._validate,
            r"POST /api/repos/create": self._create,
            rf"POST /api/models/{REPO}/preupload/(?P<revision>[^/]+)": self._preupload,
            rf"POST /{REPO}\.git/info/lfs/objects/batch": self._batch,
            rf"POST /lfs-verify/{REPO}": self._verify,
            rf"POST /api/models/{REPO}/commit/(?P<revision>[^/]+)": self._commit,
            rf"GET /api/models/{REPO}/commits/(?P<revision>[^/]+)": self._commits,
            rf"GET /api/models/{REPO}/refs": self._list_refs,
            rf"POST /api/models/{REPO}/tag/(?P<revision>[^/]+)": self._tag,
        }
        self._answers = {re.compile(pattern): answer for pattern, answer in answers.items()}

    # What a test sees

    def add_account(self, token: str, name: str, *orgs: str, role: str = "write") -> None:
        self._accounts[token] = Account(name, orgs, role)

    def add(self, repo: str, files: dict[str, bytes], tag: str | None = None) -> str:
        """Make `files` the newest commit of a model, which needs no account to be read, and return its sha."""
        with self._hub._lock:
            blobs = {path: Blob(content, path.endswith(REGULAR)) for path, content in files.items()}
            sha = self._add(repo, "main", blobs, "Add files", "").sha
            if tag is not None:
                self._hub._refs[self._key(repo)][tag] = sha
        return sha

    def tags(self, repo: str) -> dict[str, str]:
        """Commits by tag."""
        return {name: sha for name, sha in self._hub._refs[self._key(repo)].items() if name != "main"}

    def titles(self, repo: str) -> list[str]:
        """Titles of the commits that "main" is made of, newest first."""
        return [commit.title for commit in self._history(repo, "main")]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self._at(repo, revision).files.items()}

    # Answers

    def reply(self, method: str, path: str, authorization: str | None, posted: bytes) -> Reply | None:
        """The answer to a request of this half; None: it is of the other one."""
        if found := re.fullmatch(r"(PUT|POST) /lfs(?:-complete)?/([0-9a-f]{64})(?:/(\d+))?", f"{method} {path}"):
            return self._put(found[2], found[3], posted) if found[1] == "PUT" else self._complete(found[2], posted)
        account = self._accounts.get((authorization or "").removeprefix("Bearer "))
        if path.startswith("/api/models/") and authorization and account is None:
            return error_reply(401, "Invalid credentials in Authorization header")
        for pattern, answer in self._answers.items():
            if found := pattern.fullmatch(f"{method} {path}"):
                if account is None:
                    return error_reply(401, "Invalid username or password.")
                repo = found.groupdict().get("repo")
                if repo and self._key(repo) not in self._hub._repos:
                    return error_reply(404, "Repository not found", code="RepoNotFound")
                if repo and method == "POST" and not account.may_write(repo):
                    return self._forbidden(repo)
                with self._hub._lock:
                    return answer(found, account, posted)
        return None

    def _forbidden(self, repo: str) -> Reply:
        return error_reply(403, f"You don't have the rights to write a model under the namespace {repo.split('/')[0]}")

    def _whoami(self, _: object, account: Account, __: bytes) -> Reply:
        orgs = [{"name": name} for name in account.orgs]
        return json_reply({"type": "user", "name": account.name, "orgs": orgs})

    def _validate(self, _: object, __: Account, posted: bytes) -> Reply:
        content = json.loads(posted)["content"]
        if content.startswith("---\n") and "\n---\n" in content:
            return json_reply({"errors": [], "warnings": []})
        reply = json_reply({"errors": [{"message": "no front matter"}], "warnings": []})
        reply.status = 400
        return reply

    def _create(self, _: object, account: Account, posted: bytes) -> Reply:
        asked = json.loads(posted)
        repo = f"{asked['organization'] or account.name}/{asked['name']}"
        if not account.may_write(repo):
            return self._forbidden(repo)
        created = {"url": f"{self._hub.endpoint}/{repo}", "name": repo}
        if self._key(repo) in self._hub._repos:
            reply = json_reply(created | {"error": "You already created this model repo"})
            reply.status = 409
            return reply
        if asked.get("visibility") == "private":
            self.private.add(repo)
        self._add(repo, "main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", True)}, "initial commit", "")
        return json_reply(created)

    def _preupload(self, found: re.Match[str], _: Account, posted: bytes) -> Reply:
        there = self._at(found["repo"], found["revision"]).files
        files = [
            {
                "path": file["path"],
                "uploadMode": "regular" if file["path"].endswith(REGULAR) else "lfs",
                "shouldIgnore": False,
                "oid": self._oid(there.get(file["path"])),
            }
            for file in json.loads(posted)["files"]
        ]
        return json_reply({"files": files})

    def _oid(self, blob: Blob | None) -> str | None:
        """What the client compares with its own file: a sha256 of LFS's, git's hash of others."""
        return None if blob is None else blob.git_oid if blob.in_git else blob.sha256

    def _batch(self, found: re.Match[str], _: Account, posted: bytes) -> Reply:
        objects = []
        for wanted in json.loads(posted)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self._hub._blobs:
                upload: dict[str, Any] = {"href": f"{self._hub.cdn}/lfs/{oid}?signature=none"}
                if self.part_bytes and size > self.part_bytes:
                    count = -(-size // self.part_bytes)
                    parts = {str(n): f"{self._hub.cdn}/lfs/{oid}/{n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{self._hub.endpoint}/lfs-complete/{oid}",
                        "header": parts | {"chunk_size": str(self.part_bytes)},
                    }
                verify = {"href": f"{self._hub.endpoint}/lfs-verify/{found['repo']}"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return json_reply({"transfer": "basic", "objects": objects})

    def _put(self, oid: str, part: str | None, posted: bytes) -> Reply:
        with self._hub._lock:
            if part is not None:
                self._parts.setdefault(oid, {})[int(part)] = posted
                return Reply(200, {"ETag": f'"{hashlib.md5(posted).hexdigest()}"'})
            return self._store(oid, posted)

    def _complete(self, oid: str, posted: bytes) -> Reply:
        with self._hub._lock:
            numbers = [part["partNumber"] for part in json.loads(posted)["parts"]]
            return self._store(oid, b"".join(self._parts[oid][number] for number in numbers))

    def _store(self, oid: str, content: bytes) -> Reply:
        if hashlib.sha256(content).hexdigest() != oid:
            return error_reply(400, "the content is not what was announced")
        self._hub._blobs[oid] = Blob(content, in_git=False)
        return Reply(200)

    def _verify(self, _: object, __: Account, posted: bytes) -> Reply:
        return Reply(200) if json.loads(posted)["oid"] in self._hub._blobs else error_reply(404, "no such object")

    def _commit(self, found: re.Match[str], _: Account, posted: bytes) -> Reply:
        repo, lines = found["repo"], [json.loads(line) for line in posted.splitlines()]
        head, header = self._at(repo, found["revision"]), lines[0]["value"]
        if header.get("parentCommit", head.sha) != head.sha:
            return error_reply(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), in_git=True)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self._hub._blobs:
                    return error_reply(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self._hub._blobs[value["oid"]]
            else:
                del files[value["path"]]
        made = self._add(repo, found["revision"], files, header["summary"], header["description"])
        url = f"{self._hub.endpoint}/{repo}/commit/{made.sha}"
        return json_reply({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})

    def _commits(self, found: re.Match[str], _: Account, __: bytes) -> Reply:
        return json_reply(
            [
                {"id": one.sha, "title": one.title, "message": one.message, "date": DATE, "authors": [{"user": "x"}]}
                for one in self._history(found["repo"], found["revision"])
            ]
        )

    def _list_refs(self, found: re.Match[str], _: Account, __: bytes) -> Reply:
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha}
            for name, sha in self.tags(found["repo"]).items()
        ]
        head = self._at(found["repo"], "main").sha
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": head}
        return json_reply({"branches": [main], "converts": [], "tags": tags})

    def _tag(self, found: re.Match[str], _: Account, posted: bytes) -> Reply:
        tag, refs = json.loads(posted)["tag"], self._hub._refs[self._key(found["repo"])]
        if tag in refs:
            return error_reply(409, f"Tag reference exists already: {tag}")
        refs[tag] = self._at(found["repo"], found["revision"]).sha
        return Reply(201)

    # What is kept

    def _key(self, repo: str) -> str:
        return f"models/{repo}"

    def _at(self, repo: str, revision: str) -> Commit:
        key = self._key(repo)
        return self._hub._repos[key][self._hub._refs[key].get(revision, revision)]

    def _history(self, repo: str, revision: str) -> list[Commit]:
        history, commit = [], self._at(repo, revision)
        while True:
            history.append(commit)
            if commit.parent is None:
                return history
            commit = self._at(repo, commit.parent)

    def _add(self, repo: str, branch: str, files: dict[str, Blob], title: str, message: str) -> Commit:
        key = self._key(repo)
        commits, refs = self._hub._repos.setdefault(key, {}), self._hub._refs.setdefault(key, {})
        self._hub._blobs |= {blob.sha256: blob for blob in files.values()}
        sha = hashlib.sha1(f"{key} {len(commits)} {title}".encode()).hexdigest()
        commits[sha] = Commit(sha, dict(sorted(files.items())), title, message, refs.get(branch))
        refs[branch] = sha
        return commits[sha]
