"""To the Hugging Face Hub: one commit and one tag a checkpoint, however often it is tried and whatever gets in between.

    checkpoint ─▶ folder: weights, card, curves, numbers ─▶ one commit upon the newest ─▶ tag step-N

The Hub itself is asked what is there: a step that has its tag is done, one that has its commit only gets its tag. A
commit names the commit that was looked at as its parent, so it fails if anybody was faster, or if an earlier try went
through and only its answer was lost; then the Hub is asked again. `published.json` of the run remembers what was done,
for people and programs; nothing is decided by it.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myllm.checkpoint.integrity import HASH_NONE, WEIGHTS, DamagedCheckpoint, raise_if_damaged
from myllm.checkpoint.retention import MANIFEST, list_checkpoints, step_of
from myllm.config import HubConfig, ModelConfig, saved_config, to_dict
from myllm.data.sources.download import is_permanent, retry_after
from myllm.data.sources.hub_listing import first_line, hub_endpoint
from myllm.errors import UserError, out_of_space
from myllm.files import file_lock, json_safe, read_json, write_json, write_text
from myllm.formatting import format_bytes
from myllm.paths import RunPaths
from myllm.runs.history import read_config, read_json_or_empty

from .model_card import CardData, read_card_data, render_model_card, strip_local_paths

ExportFolder = Callable[[Path, Path], object]
"""Makes of a checkpoint, the first path, a new folder of weights that others can load, the second."""
LogLine = Callable[[str], None]

RETRY_DELAYS_S = (2, 10, 30, 60)
"""Between tries at one step; the client has retries of its own within each."""
READ_TIMEOUT_S = 120
"""How long a connection may be silent."""
_TITLE = re.compile(r"Step (?P<step>\d+) of .* \((?P<mark>[0-9a-f]{12})\)")


@dataclass(frozen=True)
class RemoteRepo:
    """What a repository holds."""

    head: str
    """Newest commit of "main"."""
    tags: dict[str, str]
    """Commits by tag."""
    titles: dict[str, str]
    """Of the commits of "main", newest first."""


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """The folder that is published: `transformers`' format, in the precision of the checkpoint."""
    from myllm.hub.export.transformers import export_transformers

    export_transformers(checkpoint, folder, "float32", say=lambda line: None)


def check_token() -> None:
    """
    Raises:
        UserError: no account is known here, or the Hub's address is none.
    """
    from huggingface_hub import get_token

    hub_endpoint()
    if not get_token():
        raise UserError(
            "publishing needs an account of the Hugging Face Hub, and no token is known here: log in with "
            "`hf auth login`, or set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens)"
        )


def check_export(model: ModelConfig) -> None:
    """
    Raises:
        UserError: a model that `transformers` has no architecture for; or it is not installed, to compare with.
    """
    from myllm.hub.export.verify import require_transformers

    from .architectures import select_architecture

    select_architecture(model)
    require_transformers()


def create_repo(hub: HubConfig) -> None:
    """Make the repository, unless it is there.

    Raises:
        UserError: this account may not.
        Exception: the client's own, where the Hub cannot be asked.
    """
    from huggingface_hub import HfApi

    with _client_timeout():
        try:
            HfApi().create_repo(hub.repo, private=hub.private or None, exist_ok=True)
        except Exception as error:
            if _http_status(error) and is_permanent(error):
                raise UserError(explain_error(error, hub)) from None
            raise


def select_checkpoints(run: RunPaths, every_checkpoint: bool, up_to: int | None = None) -> list[Path]:
    """The checkpoints to publish, oldest first: all, or the newest. What is in them is looked at when they are read.

    Raises:
        UserError: there is none.
    """
    found = [folder for folder in list_checkpoints(run.checkpoints) if up_to is None or step_of(folder) <= up_to]
    if not found:
        raise UserError(f"no intact checkpoint in {run.checkpoints}; train first, then publish")
    return found[::-1] if every_checkpoint else found[:1]


def publish(run: RunPaths, checkpoints: list[Path], hub: HubConfig, make_folder: ExportFolder, say: LogLine) -> None:
    """Publish checkpoints in the order given, each with tries of its own. A damaged one is passed over; without
    `hub.every_checkpoint` the next older one takes its place.

    Raises:
        UserError: what stopped it, and what to do; those before are published. Or all are damaged.
    """
    try:
        with file_lock(run.root / ".publish.lock", wait=False), _client_timeout():
            already, damaged, queue = [], 0, list(checkpoints)
            for checkpoint in queue:
                work = run.root / ".publishing"
                shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
                try:
                    if not _publish_with_retries(run, checkpoint, hub, make_folder, say, work):
                        already.append(f"{step_of(checkpoint):,}")
                except DamagedCheckpoint as error:
                    say(f"{error}; it is passed over")
                    damaged += 1
                    if not hub.every_checkpoint and checkpoint == queue[-1]:
                        queue += select_checkpoints(run, False, step_of(checkpoint) - 1) if step_of(checkpoint) else []
                finally:
                    shutil.rmtree(work, ignore_errors=True)
            if damaged and damaged == len(queue):
                raise UserError(f"no checkpoint in {run.checkpoints} is intact; nothing was published")
            if already:
                say(f"{hub.repo} has step {', '.join(already)} already")
    except BlockingIOError:
        raise UserError(f"another process is publishing {run.root} just now; wait for it, or stop it first") from None


def _publish_with_retries(
    run: RunPaths, checkpoint: Path, hub: HubConfig, make_folder: ExportFolder, say: LogLine, work: Path
) -> bool:  # fmt: skip
    """Whether there was something to do."""
    for delay in (*RETRY_DELAYS_S, None):
        try:
            return _publish_step(run, checkpoint, hub, make_folder, say, work)
        except Exception as error:
            if not checkpoint.is_dir():  # train.keep_last has removed it
                say(f"step {step_of(checkpoint):,} was removed before it could be published")
                return True
            cause = _http_error(error)
            if out_of_space(error):
                raise UserError(f"no room in {run.root} to make what is to be published; free some space") from None
            if cause is None:
                raise
            overtaken = _http_status(cause) in (409, 412)
            if delay is None or (is_permanent(cause) and not overtaken):
                raise UserError(explain_error(cause, hub)) from None
            wait = 0 if overtaken else max(delay, retry_after(cause))
            say(f"publishing to {hub.repo}: {explain_error(cause, hub)}; again in {wait} s")
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _publish_step(
    run: RunPaths, checkpoint: Path, hub: HubConfig, make_folder: ExportFolder, say: LogLine, work: Path
) -> bool:  # fmt: skip
    """One try; False: it was published before. `work` keeps the folder of a try that failed for the next."""
    from huggingface_hub import CommitOperationAdd, HfApi

    raise_if_damaged(checkpoint, HASH_NONE)
    api, step, mark = HfApi(), step_of(checkpoint), _weights_digest(checkpoint)
    tag = f"step-{step}"
    there = _read_remote(api, hub)
    if tag in there.tags:
        _check_same_weights(there, tag, mark, hub)
        _record(run, hub, tag, there.tags[tag])
        return False
    commit = next((sha for sha, title in there.titles.items() if _parse_title(title) == (step, mark)), None)
    if commit is None:
        newer = next((title for title in there.titles.values() if _parse_title(title)[0] > step), None)
        if newer:
            say(f"step {step:,} is older than what {hub.repo} shows ({newer}), and is passed over")
            return True
        folder = _build_folder(run, checkpoint, hub, make_folder, work)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        say(f"publishing step {step:,} to {hub.repo}: {format_bytes(sum(path.stat().st_size for path in files))}")
        commit = api.create_commit(
            hub.repo,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
            commit_message=f"Step {step} of {run.root.name} ({mark})",
            parent_commit=there.head,
        ).oid
    api.create_tag(hub.repo, tag=tag, revision=commit, exist_ok=True)
    _record(run, hub, tag, commit)
    say(f"published step {step:,}: {api.endpoint}/{hub.repo} (revision {tag})")
    return True


def _build_folder(run: RunPaths, checkpoint: Path, hub: HubConfig, make_folder: ExportFolder, work: Path) -> Path:
    """What is published of a checkpoint; made once for all tries."""
    folder, unfinished = work / "whole", work / "unfinished"
    if not folder.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
        work.mkdir(exist_ok=True)
        make_folder(checkpoint, unfinished)
        add_run_files(unfinished, run, step_of(checkpoint), hub)
        unfinished.rename(folder)
    return folder


def _read_remote(api: Any, hub: HubConfig) -> RemoteRepo:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        refs = api.list_repo_refs(hub.repo)
    except RepositoryNotFoundError:
        api.create_repo(hub.repo, private=hub.private or None, exist_ok=True)
        refs = api.list_repo_refs(hub.repo)
    return RemoteRepo(
        head=next(branch.target_commit for branch in refs.branches if branch.name == "main"),
        tags={tag.name: tag.target_commit for tag in refs.tags},
        titles={commit.commit_id: commit.title for commit in api.list_repo_commits(hub.repo)},
    )


def _weights_digest(checkpoint: Path) -> str:
    """Which weights a checkpoint holds, in twelve letters."""
    manifest = read_json(checkpoint / MANIFEST)
    weights = [of["sha256"] for name, of in sorted(manifest["files"].items()) if name.startswith(f"{WEIGHTS}/")]
    return hashlib.sha256("".join(weights).encode()).hexdigest()[:12]


def _parse_title(title: str) -> tuple[int, str]:
    """Step and mark in the title of a commit of ours; (-1, "") in another's."""
    found = _TITLE.fullmatch(title)
    return (int(found["step"]), found["mark"]) if found else (-1, "")


def _check_same_weights(there: RemoteRepo, tag: str, mark: str, hub: HubConfig) -> None:
    title = there.titles.get(there.tags[tag], "another branch's commit")
    if _parse_title(title)[1] != mark:
        raise UserError(
            f"{hub.repo} has a revision {tag} already, of other weights ({title}); nothing was changed there. Give "
            "another repository, or delete that tag on the Hub if it is to be replaced"
        )


def add_run_files(folder: Path, run: RunPaths, step: int, hub: HubConfig) -> None:
    """Lay the run's own numbers, the curves and the card beside the weights."""
    from myllm.hub.export.transformers import EXPORT_FILE
    from myllm.runs.report.plots import PLOTS, save_figures  # brings Matplotlib, which training does without

    exported = read_json_or_empty(folder / "config.json") | {
        "tokenizer": read_json_or_empty(folder / EXPORT_FILE).get("tokenizer")
    }
    about = read_card_data(run, step, str(hub.repo), hub.license, exported)
    curves: list[str] = []
    if about.metrics:
        drawn = save_figures(about.metrics, read_config(run.config), folder / "plots")
        if narrow := drawn.pop("loss_compact", None):
            narrow.unlink()
        curves = [name for name in PLOTS if name in drawn]
    _write_numbers(folder / "training", about)
    write_text(folder / "README.md", render_model_card(about, curves))


def _write_numbers(folder: Path, about: CardData) -> None:
    folder.mkdir(exist_ok=True)
    config = to_dict(about.config)
    del config["hub"]
    write_json(folder / "config.json", _strip_all_paths(config))
    write_json(folder / "environment.json", _strip_all_paths(about.environment))
    if about.metrics:
        rows = [*about.metrics.train, *(row for rows in about.metrics.evals.values() for row in rows)]
        lines = [
            json.dumps(json_safe(row), ensure_ascii=False) + "\n" for row in sorted(rows, key=lambda row: row["step"])
        ]
        write_text(folder / "metrics.jsonl", "".join(lines))


def _strip_all_paths(value: Any) -> Any:
    """JSON values without the names of this machine's folders."""
    match value:
        case dict():
            return {key: _strip_all_paths(each) for key, each in value.items()}
        case list():
            return [_strip_all_paths(each) for each in value]
        case str():
            return strip_local_paths(value)
        case _:
            return value


def _record(run: RunPaths, hub: HubConfig, tag: str, commit: str) -> None:
    known = read_json_or_empty(run.published)
    steps = known.get("published") if known.get("repo") == hub.repo else {}
    write_json(
        run.published, {"repo": hub.repo, "published": (steps if isinstance(steps, dict) else {}) | {tag: commit}}
    )


def saved_hub_config(run: RunPaths) -> HubConfig:
    """What the run's own config says about publishing."""
    return saved_config(read_json_or_empty(run.config), run.config).hub


# -- what can go wrong ------------------------------------------------------------------------------------------------


def _http_error(error: BaseException | None) -> Exception | None:
    """The error of the connection or of the Hub's answer that another one came from."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    while error is not None and not isinstance(error, HTTPError | OfflineModeIsEnabled):
        error = error.__cause__ or error.__context__
    return error


def _http_status(error: Exception) -> int:
    return getattr(getattr(error, "response", None), "status_code", 0)


def redact_token(text: str) -> str:
    from huggingface_hub import get_token

    return text.replace(get_token() or "\0", "(token)")


def explain_error(error: Exception, hub: HubConfig) -> str:
    """What happened and what to do about it, without the token, whatever the server's answer holds."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status, said = _http_status(error), redact_token(getattr(error, "server_message", None) or first_line(error))
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it, or publish from a machine with a network"
    if status == 401:
        return "the Hub does not know this token: log in with `hf auth login`, or set HF_TOKEN to one that holds"
    if status == 403:
        namespace = str(hub.repo).partition("/")[0]
        return f"this token may not write to {hub.repo}: it needs write access to what belongs to {namespace} ({said})"
    if status:
        return f"the Hub answered {status} ({said})"
    return f"the Hub cannot be reached ({said}); check the network, a proxy (HTTPS_PROXY) and HF_ENDPOINT"


@contextmanager
def _client_timeout() -> Iterator[None]:
    """The client, which would wait for a silent connection for ever, gives up in the end; so its retries begin."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def impatient() -> Any:
        client = default_client_factory()
        client.timeout = READ_TIMEOUT_S
        return client

    set_client_factory(impatient)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)
