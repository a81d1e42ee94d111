"""`myllm serve`: Ctrl-C, wrong arguments, and what the package contains."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from support import warm_start
from support.saved_checkpoints import save_weights
from support.serving import DEADLINE_S, post_head

from myllm.cli.main import main as run_command
from myllm.config import ModelConfig
from myllm.errors import UserError
from myllm.inference.server.request import MAX_NEW_TOKENS
from myllm.inference.server.security import listen
from myllm.model.transformer import Transformer

LONG = {"prompt": "on and on", "max_new_tokens": MAX_NEW_TOKENS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    save_weights(
        folder / "runs/tiny/checkpoints",
        Transformer(ModelConfig(max_seq_len=32, d_model=16, n_layers=2, n_heads=2, d_ff=32)),
    )
    return folder


def command(data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = warm_start.run("-m", "myllm", *words, env=os.environ | {"MYLLM_DATA": str(data)}, timeout=DEADLINE_S)
    assert "Traceback" not in done.stderr
    return done


def test_ctrl_c_during_streaming(data: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "myllm", "serve", "tiny", "--port", "0", "--temperature", "0.5", "--device", "cpu"],
        env=os.environ | {"MYLLM_DATA": str(data)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        banner = process.stdout.readline()
        port = int(re.fullmatch(r"serving tiny at http://127\.0\.0\.1:(\d+) \(press Ctrl-C to stop\)\n", banner)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as client:
            body = json.dumps(LONG).encode()
            client.sendall(post_head(len(body)) + body)
            lines = client.makefile("rb")
            assert any(b'"kind": "token"' in line for line in lines)  # ends with the server
            process.send_signal(signal.SIGINT)
            rest = lines.read()
        assert b'"kind": "end"' not in rest  # the page sees that the text is not whole
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait(timeout=DEADLINE_S)
    assert (process.returncode, out.strip(), err) == (0, "stopped", "")


def test_invalid_arguments_rejected(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = command(data, "serve", "tiny", "--port", port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use; give another --port" in done.stderr
    monkeypatch.setenv("MYLLM_DATA", str(data))
    messages = []
    for words in (
        ["serve", "tinny", "--port", "0"],
        ["sample", "tinny"],
        ["serve", "tiny", "--top-p", "0", "--max-new-tokens", "-1"],
        ["serve", "tiny", "tinny"],
        ["serve", "tiny", "tiny"],
        ["serve"],
    ):
        with pytest.raises(SystemExit) as ended:
            run_command(words)
        assert ended.value.code == 2
        messages.append(capsys.readouterr().err)
    assert messages[0] == messages[1]
    assert "top_p 0.0: give" in messages[2]
    assert "max_new_tokens -1: give" in messages[2]
    assert messages[3] == messages[0]
    assert "got tiny tiny, expected MODEL, or two different ones" in messages[4]
    assert "got no model, expected MODEL" in messages[5]


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 70_000), ("no.such.host.invalid", 0), ("192.0.2.1", 0), ("", 0)]
)
def test_invalid_addresses(host: str, port: int) -> None:
    with pytest.raises(UserError, match="give"):
        listen(host, port).close()


def test_wheel_contains_page_and_reference_curve(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE.txt"):
        shutil.copy(ROOT / name, tmp_path)
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    assert {"myllm/inference/server/page.html", "myllm/runs/reference.json"} <= set(zipfile.ZipFile(wheel).namelist())
