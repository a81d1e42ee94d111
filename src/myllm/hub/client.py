"""The Hugging Face Hub as publishing sees it: the access token, the repository, timeouts, and errors with a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from myllm.config import HubConfig
from myllm.data.sources.download import is_permanent
from myllm.data.sources.hub_listing import first_line, hub_endpoint
from myllm.errors import UserError

READ_TIMEOUT_S = 120


def check_token() -> None:
    """
    Raises:
        UserError: no access token is set, or HF_ENDPOINT is not a URL.
    """
    from huggingface_hub import get_token

    hub_endpoint()
    if not get_token():
        raise UserError(
            "publishing needs a Hugging Face account, and no access token was found: log in with `hf auth login`, or "
            "set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens)"
        )


def create_repo(hub: HubConfig) -> None:
    """Create the repository if it does not exist.

    Raises:
        UserError: this account must not.
        Exception: an error of the client, if the Hub could not be asked.
    """
    from huggingface_hub import HfApi

    assert hub.repo is not None
    with client_timeout():
        try:
            HfApi().create_repo(hub.repo, private=hub.private or None, exist_ok=True)
        except Exception as error:
            if http_status(error) and is_permanent(error):
                raise UserError(explain_error(error, hub)) from None
            raise


def http_error(error: BaseException | None) -> Exception | None:
    """The HTTP or connection error that caused an error, if any."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    while error is not None and not isinstance(error, HTTPError | OfflineModeIsEnabled):
        error = error.__cause__ or error.__context__
    return error


def http_status(error: Exception) -> int:
    """The HTTP status code of an error; 0 without an answer."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def redact_token(text: str) -> str:
    from huggingface_hub import get_token

    return text.replace(get_token() or "\0", "(token)")


def explain_error(error: Exception, hub: HubConfig) -> str:
    """What happened and how to fix it. Never contains the token, even if the server sends it back."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = http_status(error)
    message = redact_token(getattr(error, "server_message", None) or first_line(error))
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it, or publish from a machine with a network"
    if status == 401:
        return "the Hub rejected the access token: log in with `hf auth login`, or set HF_TOKEN to a valid token"
    if status == 403:
        owner = str(hub.repo).partition("/")[0]
        return f"this token must not write to {hub.repo}: it needs write access to repositories of {owner} ({message})"
    if status:
        return f"the Hub answered {status} ({message})"
    return f"the Hub is not reachable ({message}); check the network, a proxy (HTTPS_PROXY) and HF_ENDPOINT"


@contextmanager
def client_timeout() -> Iterator[None]:
    """Limit how long a connection may be silent: the client would wait forever and never retry."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client_with_timeout() -> Any:
        client = default_client_factory()
        client.timeout = READ_TIMEOUT_S
        return client

    set_client_factory(client_with_timeout)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)
