"""`myllm publish`: a run's checkpoints, on the Hugging Face Hub."""

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
        run: its name, or its folder.
        repo: NAMESPACE/NAME on the Hub; not given: where the run's own config says.
        private: make the repository a private one, if it is not there yet.
        every_checkpoint: each checkpoint that there is, each as a revision; not given: the newest.
        license: of the weights, by the Hub's short name for it, such as mit or apache-2.0.
    """
    given = HubConfig(repo, private, every_checkpoint, license)
    if repo is not None and (faults := hub_errors(given, "--")):
        raise UserError("; ".join(faults))
    paths.check_model_path(run, hub=False)  # before the seconds that torch takes
    from myllm.checkpoint.locate import resolve_checkpoints

    _, checkpoints = resolve_checkpoints(run, paths.runs_dir())
    found = paths.RunPaths(checkpoints[0].parent.parent)
    from myllm.hub import publish as publishing

    hub = publishing.saved_hub_config(found)
    given = HubConfig(repo or hub.repo, private, every_checkpoint, license)
    if given.repo is None:
        raise UserError("where to? Give --repo NAMESPACE/NAME, such as my-account/my-model")
    if faults := hub_errors(given, "--"):
        raise UserError("; ".join(faults))
    publishing.check_token()
    hub = replace(given, private=private or hub.private, license=license or hub.license)
    try:
        publishing.publish(
            found, publishing.select_checkpoints(found, every_checkpoint), hub, publishing.export_checkpoint, print
        )
    except UserError as error:
        raise UserError(f"{error}\nNothing is lost: the same command goes on where this one stopped") from None
