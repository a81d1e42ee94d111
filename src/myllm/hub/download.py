"""A model's repository of the Hub, in the Hub's own cache."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import errors, snapshot_download

from myllm.data.sources.hub_listing import hub_endpoint
from myllm.errors import UserError, out_of_space

from .import_lf_llm import CHECKPOINT
from .import_transformers import CONFIG, read_model_config

SETTINGS = ("*.json",)
WEIGHTS = ("model.safetensors", "model-*.safetensors", CHECKPOINT)


def download(repo: str, revision: str | None, say: Callable[[str], None]) -> Path:
    """The folder that holds what an import reads of a repository. Weights come last, once the rest of it is of use.

    Raises:
        UserError: not there, not open to this account, out of reach, or a model or a vocabulary that cannot be used.
    """
    say(f"looking for {repo} on the Hub")
    folder = _fetch(repo, revision, SETTINGS)
    if (folder / CONFIG).is_file():
        read_model_config(folder)
    return _fetch(repo, revision, SETTINGS + WEIGHTS)


def _fetch(repo: str, revision: str | None, files: tuple[str, ...]) -> Path:
    hub_endpoint()  # one that cannot be is not tried
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files), ignore_patterns="*/*"))
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a model: {error}") from None
    except errors.GatedRepoError:
        raise UserError(f"{repo} is gated: accept its terms on its page, then log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo} has no revision {revision!r}; leave it out for the newest") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"there is no folder {repo!r} here, and the Hub has no such model, or none that this account may read; "
            "check the name, or log in with `hf auth login`"
        ) from None
    except OSError as error:
        if out_of_space(error):
            raise
        raise UserError(_unreachable(repo, error)) from None
    except Exception as error:  # the client's errors have no common class over its versions
        raise UserError(_unreachable(repo, error)) from None


def _unreachable(repo: str, error: BaseException) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"cannot get {repo} from the Hub: {reason}; check the network, a proxy (HTTPS_PROXY), HF_ENDPOINT and "
        "HF_HUB_OFFLINE. The same command goes on with what is there"
    )
