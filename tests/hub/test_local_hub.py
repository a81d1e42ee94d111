"""The Hub of docs/local_hub.py, with the Hub's own client."""

import os
import re
import shlex
import signal
import subprocess
import sys

from conftest import ROOT

CLIENT = """
from huggingface_hub import HfApi, hf_hub_download
api = HfApi()
print(api.whoami()["name"])
api.create_repo("me/my-model")
api.upload_file(path_or_fileobj=b"some notes", path_in_repo="notes.txt", repo_id="me/my-model")
print(open(hf_hub_download("me/my-model", "notes.txt")).read())
"""


def test_publishes_as_its_export_line_says() -> None:
    words = [sys.executable, ROOT / "docs/local_hub.py"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as hub:
        try:
            assert hub.stdout is not None
            printed = "".join(hub.stdout.readline() for _ in range(4))
            line = re.search(r"^  export (.+)$", printed, re.MULTILINE)
            assert line, printed
            variables = dict(word.split("=", 1) for word in shlex.split(line[1]))
            client = subprocess.run(
                [sys.executable, "-c", CLIENT], env=os.environ | variables, capture_output=True, text=True, check=False
            )
            assert client.stdout.splitlines() == ["me", "some notes"], client.stderr
        finally:
            hub.send_signal(signal.SIGINT)
            rest, errors = hub.communicate(timeout=60)
    assert (hub.returncode, errors) == (0, "")
    assert "has ended" in rest
