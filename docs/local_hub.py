"""Serve a Hub on this machine, to rehearse publishing without an account and without a network:
`python docs/local_hub.py`, Ctrl-C ends it.

It is the tests' stand-in (tests/support/hub_server.py): it speaks as much of the Hub as publishing and loading a model
need, to this machine only, and keeps everything in memory.
"""

import shlex
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests")]

from support.hub_server import HubServer  # noqa: E402 (the path is set above)

ACCOUNT, TOKEN = "me", "hf_local"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="local-hub-") as home, HubServer() as hub, suppress(KeyboardInterrupt):
        hub.models.add_account(TOKEN, ACCOUNT)
        variables = {**hub.environment(Path(home)), "HF_TOKEN": TOKEN}
        print(f"a Hub on this machine, in memory, until Ctrl-C. In another terminal, from which {ACCOUNT} publishes:\n")
        print("  export " + shlex.join(f"{name}={value}" for name, value in variables.items()))
        print(f"  myllm publish RUN --repo {ACCOUNT}/my-model", flush=True)
        threading.Event().wait()
    print("the local Hub has ended")


if __name__ == "__main__":
    main()
