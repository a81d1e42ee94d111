"""Download a model's repository into the Hub's own cache."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import errors, snapshot_download

from myllm.data.sources.hub_listing import first_line, hub_endpoint
from myllm.errors import UserError, out_of_space

from .import_lf_llm import CHECKPOINT
from .import_transformers import CONFIG, read_model_config

SETTINGS = ("*.json",)
WEIGHTS = ("model.safetensors", "model-*.safetensors", CHECKPOINT)


def download(repo: str, revision: str | None, say: Callable[[str], None]) -> Path:
    """The folder with the files that an import reads. Weights are downloaded after everything else is checked.

    Raises:
        UserError: no such repository, no access, no connection, or an unsupported model or vocabulary.
    """
    say(f"looking for {repo} on the Hub")
    folder = _snapshot(repo, revision, SETTINGS)
    if (folder / CONFIG).is_file():
        read_model_config(folder)
    return _snapshot(repo, revision, SETTINGS + WEIGHTS)


def _snapshot(repo: str, revision: str | None, files: tuple[str, ...]) -> Path:
    hub_endpoint()  # rejects an invalid address
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files), ignore_patterns="*/*"))
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is not a valid model name: {first_line(error)}") from None
    except errors.GatedRepoError:
        raise UserError(f"{repo} is gated: accept its terms on its page, then log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo} has no revision {revision!r}; omit it for the newest") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"no folder {repo!r}, and no model of that name on the Hub that this account may read; check the name, or "
            "log in with `hf auth login`"
        ) from None
    except Exception as error:  # the client's errors have no common class across its versions
        if out_of_space(error):
            raise
        raise UserError(
            f"cannot download {repo} from the Hub: {first_line(error)}; check the network, a proxy (HTTPS_PROXY), "
            "HF_ENDPOINT and HF_HUB_OFFLINE. Run the same command again to continue the download"
        ) from None
