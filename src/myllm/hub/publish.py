"""Publishes checkpoints on the Hugging Face Hub: one commit and one tag for each, however often publishing is retried.

    checkpoint ─▶ folder: weights, card, figures, metrics ─▶ one commit on top of the newest ─▶ tag step-N

The Hub decides what is left to do: a step that has its tag is done, a step that has its commit only needs the tag. A
commit names its parent, so it fails if someone else was faster or if an earlier attempt succeeded and only its answer
was lost; then the Hub is read again.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myllm.checkpoint.integrity import HASH_NONE, DamagedCheckpoint, raise_if_damaged
from myllm.checkpoint.layout import MANIFEST, WEIGHTS, list_checkpoints, step_of
from myllm.config import HubConfig, ModelConfig, to_dict
from myllm.data.sources.download import is_permanent, retry_after
from myllm.errors import UserError, out_of_space
from myllm.files import file_lock, json_safe, map_json, read_json, write_json, write_text
from myllm.formatting import format_bytes
from myllm.paths import RunPaths
from myllm.runs.history import read_config, read_json_or_empty

from .client import client_timeout, explain_error, http_error, http_status

ExportFolder = Callable[[Path, Path], object]
"""Exports a checkpoint, the first path, to a new folder, the second."""
LogLine = Callable[[str], None]

RETRY_DELAYS_S = (2, 10, 30, 60)
"""Between attempts at one step; the client also retries within each attempt."""
_TITLE = re.compile(r"Step (?P<step>\d+) of .* \((?P<digest>[0-9a-f]{12})\)")


@dataclass(frozen=True)
class RemoteRepo:
    """What a repository holds."""

    head: str
    """Newest commit of "main"."""
    tags: dict[str, str]
    """Commits by tag."""
    titles: dict[str, str]
    """Titles by commit of "main", newest first."""


@dataclass(frozen=True)
class _Job:
    """What publishing one checkpoint needs."""

    run: RunPaths
    hub: HubConfig
    export: ExportFolder
    log: LogLine
    checkpoint: Path

    @property
    def step(self) -> int:
        return step_of(self.checkpoint)

    @property
    def work(self) -> Path:
        """A temporary folder for the files to upload."""
        return self.run.root / ".publishing"


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Export a checkpoint for `transformers`, in float32."""
    from myllm.hub.export.transformers import export_transformers

    export_transformers(checkpoint, folder, "float32", say=lambda line: None)


def check_export(model: ModelConfig) -> None:
    """
    Raises:
        UserError: `transformers` has no architecture for the model, or is not installed.
    """
    from myllm.hub.export.verify import require_transformers

    from .architectures import select_architecture

    select_architecture(model)
    require_transformers()


def select_checkpoints(run: RunPaths, every_checkpoint: bool, up_to: int | None = None) -> list[Path]:
    """The checkpoints to publish, oldest first: all, or the newest. They may still turn out to be damaged.

    Raises:
        UserError: there is none.
    """
    checkpoints = [folder for folder in list_checkpoints(run.checkpoints) if up_to is None or step_of(folder) <= up_to]
    if not checkpoints:
        raise UserError(f"no intact checkpoint in {run.checkpoints}; train first, then publish")
    return checkpoints[::-1] if every_checkpoint else checkpoints[:1]


def publish(run: RunPaths, checkpoints: list[Path], hub: HubConfig, export: ExportFolder, log: LogLine) -> None:
    """Publish checkpoints in this order, with retries. Damaged ones are skipped; without `hub.every_checkpoint` the
    next older one is published instead.

    Raises:
        UserError: publishing failed, and how to fix it; the checkpoints before are published. Or all are damaged.
    """
    try:
        with file_lock(run.root / ".publish.lock", wait=False), client_timeout():
            published_before, n_damaged, queue = [], 0, list(checkpoints)
            for checkpoint in queue:
                job = _Job(run, hub, export, log, checkpoint)
                shutil.rmtree(job.work, ignore_errors=True)  # of a process that was killed
                try:
                    if not _publish_with_retries(job):
                        published_before.append(f"{job.step:,}")
                except DamagedCheckpoint as error:
                    log(f"{error}; skipped")
                    n_damaged += 1
                    if not hub.every_checkpoint and checkpoint == queue[-1] and job.step:
                        queue += select_checkpoints(run, False, up_to=job.step - 1)
                finally:
                    shutil.rmtree(job.work, ignore_errors=True)
            if n_damaged and n_damaged == len(queue):
                raise UserError(f"no checkpoint in {run.checkpoints} is intact; nothing was published")
            if published_before:
                log(f"{hub.repo} already has step {', '.join(published_before)}")
    except BlockingIOError:
        raise UserError(f"another process is publishing {run.root}; wait until it ends, or stop it") from None


def _publish_with_retries(job: _Job) -> bool:
    """Publish a checkpoint; False if it was published before."""
    for delay in (*RETRY_DELAYS_S, None):
        try:
            return _publish_step(job)
        except Exception as error:
            if not job.checkpoint.is_dir():  # deleted by train.keep_last
                job.log(f"step {job.step:,} was removed before it could be published")
                return True
            if out_of_space(error):
                raise UserError(f"not enough disk space in {job.run.root} to prepare the upload; free some") from None
            cause = http_error(error)
            if cause is None:
                raise
            overtaken = http_status(cause) in (409, 412)
            if delay is None or (is_permanent(cause) and not overtaken):
                raise UserError(explain_error(cause, job.hub)) from None
            wait_s = 0 if overtaken else max(delay, retry_after(cause))
            job.log(f"publishing to {job.hub.repo}: {explain_error(cause, job.hub)}; retrying in {wait_s} s")
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _publish_step(job: _Job) -> bool:
    """One attempt; False if the step was published before. A failed attempt leaves its folder to the next."""
    from huggingface_hub import CommitOperationAdd, HfApi

    raise_if_damaged(job.checkpoint, HASH_NONE)
    api, step, digest, repo = HfApi(), job.step, _weights_digest(job.checkpoint), job.hub.repo
    assert repo is not None
    tag = f"step-{step}"
    remote = _read_remote(api, job.hub)
    if tag in remote.tags:
        _check_same_weights(remote, tag, digest, job.hub)
        return False
    commit = next((commit for commit, title in remote.titles.items() if _parse_title(title) == (step, digest)), None)
    if commit is None:
        newer = next((title for title in remote.titles.values() if _parse_title(title)[0] > step), None)
        if newer:
            job.log(f"step {step:,} is older than the newest in {repo} ({newer}); skipped")
            return True
        folder = _build_folder(job)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        job.log(f"publishing step {step:,} to {repo}: {format_bytes(sum(path.stat().st_size for path in files))}")
        # Not upload_folder: it may split a large folder into several commits.
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
            commit_message=f"Step {step} of {job.run.root.name} ({digest})",
            parent_commit=remote.head,
        ).oid
    api.create_tag(repo, tag=tag, revision=commit, exist_ok=True)
    job.log(f"published step {step:,}: {api.endpoint}/{repo} (revision {tag})")
    return True


def _build_folder(job: _Job) -> Path:
    """The files to upload, built once for all attempts."""
    folder, partial = job.work / "complete", job.work / "partial"
    if not folder.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        job.work.mkdir(exist_ok=True)
        job.export(job.checkpoint, partial)
        add_run_files(partial, job.run, job.step, job.hub)
        partial.rename(folder)
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
    """Twelve hexadecimal digits that identify the weights of a checkpoint."""
    files = read_json(checkpoint / MANIFEST)["files"]
    digests = [entry["sha256"] for name, entry in sorted(files.items()) if name.startswith(f"{WEIGHTS}/")]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def _parse_title(title: str) -> tuple[int, str]:
    """Step and weights digest in the title of a commit; (-1, "") if it is not one of ours."""
    match = _TITLE.fullmatch(title)
    return (int(match["step"]), match["digest"]) if match else (-1, "")


def _check_same_weights(remote: RemoteRepo, tag: str, digest: str, hub: HubConfig) -> None:
    title = remote.titles.get(remote.tags[tag], "a commit of another branch")
    if _parse_title(title)[1] != digest:
        raise UserError(
            f"{hub.repo} already has a revision {tag} with other weights ({title}); nothing was changed. Use another "
            "repository, or delete that tag on the Hub to replace it"
        )


# -- files beside the weights -----------------------------------------------------------------------------------------


def add_run_files(folder: Path, run: RunPaths, step: int, hub: HubConfig) -> None:
    """Add the run's settings and metrics up to `step`, its figures and the model card to an exported folder."""
    from myllm.hub.export.transformers import EXPORT_FILE
    from myllm.runs.report.plots import PLOTS, save_figures  # imports Matplotlib, which training does not need

    from .model_card import read_card_data, render_model_card

    exported = read_json_or_empty(folder / "config.json")
    exported["tokenizer"] = read_json_or_empty(folder / EXPORT_FILE).get("tokenizer")
    data = read_card_data(run, step, str(hub.repo), hub.license, exported)
    config = {name: settings for name, settings in to_dict(data.config).items() if name != "hub"}
    (folder / "training").mkdir(exist_ok=True)
    write_json(folder / "training/config.json", _strip_all_paths(config))
    write_json(folder / "training/environment.json", _strip_all_paths(data.environment))
    figures: dict[str, Path] = {}
    if rows := [*data.metrics.train, *(row for rows in data.metrics.evals.values() for row in rows)]:
        rows.sort(key=lambda row: row["step"])
        lines = [json.dumps(json_safe(row), ensure_ascii=False) + "\n" for row in rows]
        write_text(folder / "training/metrics.jsonl", "".join(lines))
        figures = save_figures(data.metrics, read_config(run.config), folder / "plots")
        if compact := figures.pop("loss_compact", None):
            compact.unlink()
    write_text(folder / "README.md", render_model_card(data, {name: PLOTS[name].description for name in figures}))


def _strip_all_paths(value: Any) -> Any:
    """JSON values without local folders."""
    from .model_card import strip_local_paths

    return map_json(lambda leaf: strip_local_paths(leaf) if isinstance(leaf, str) else leaf, value)
