"""`myllm publish`: checkpoints of a run to the Hugging Face Hub."""

from dataclasses import replace

import tyro

from myllm import paths
from myllm.config import HubConfig
from myllm.errors import UserError
from myllm.planning.validation import hub_errors

Positional = tyro.conf.Positional


def publish(
    run: Positional[str],
    repo: str | None = None,
    private: bool = False,
    every_checkpoint: bool = False,
    license: str | None = None,
) -> None:
    """Publish a run to the Hugging Face Hub (rerun to resume).

    Args:
        run: name or folder of the run.
        repo: repository on the Hub, NAMESPACE/NAME (default: the run's hub.repo).
        private: create the repository as a private one.
        every_checkpoint: publish each checkpoint as a revision (default: only the newest).
        license: license of the weights, as the Hub abbreviates it, such as mit or apache-2.0.
    """
    wanted = HubConfig(repo, private, every_checkpoint, license)
    if repo is not None and (errors := hub_errors(wanted, "--")):
        raise UserError("; ".join(errors))
    paths.check_model_path(run, hub=False)  # before torch is imported, which takes seconds
    from myllm.checkpoint.locate import resolve_checkpoints

    _, checkpoints = resolve_checkpoints(run, paths.runs_dir())
    run_paths = paths.RunPaths(checkpoints[0].parent.parent)
    from myllm.hub import publish as publishing
    from myllm.hub.client import check_token

    saved = publishing.saved_hub_config(run_paths)
    wanted = replace(wanted, repo=repo or saved.repo)
    if wanted.repo is None:
        raise UserError("missing --repo NAMESPACE/NAME, for example --repo my-account/my-model")
    if errors := hub_errors(wanted, "--"):
        raise UserError("; ".join(errors))
    check_token()
    hub = replace(wanted, private=private or saved.private, license=license or saved.license)
    checkpoints = publishing.select_checkpoints(run_paths, every_checkpoint)
    try:
        publishing.publish(run_paths, checkpoints, hub, publishing.export_checkpoint, print)
    except UserError as error:
        raise UserError(f"{error}\nNothing is lost: rerun the same command to resume") from None
