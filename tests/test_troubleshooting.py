"""Each failure of docs/troubleshooting.md is provoked, and the message must be the one on that page."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, command, launch, tiny_config, with_train, write_run_config
from support import warm_start
from support.processes import with_words
from test_scripts import Machine

from myllm.config import RunConfig
from myllm.distributed.device_info import cuda_problem
from myllm.runs.heartbeat import status

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^```text\n(.*?)\n```$", PAGE, re.M | re.S)
FAKE_DRIVER = "#!/bin/sh\necho '| NVIDIA-SMI 535.1   Driver Version: 535.1   CUDA Version: 12.2 |'\n"
EVERY_STEP = ["--train.keep-last", "0", "--train.save-every-steps", "1", "--train.max-steps", "99M"]
HUGE = ("--model.d-model", "8192", "--model.d-ff", "32768", "--model.n-layers", "100", "--model.n-heads", "64")
pytestmark = pytest.mark.slow


def check(start: str, output: str) -> None:
    """The one message of the page that begins so is in the output; `...` in it stands for anything in a line."""
    (message,) = [message for message in MESSAGES if message.startswith(start)]
    parts = [re.escape(part) for part in message.split("...")]
    assert re.search("[^\n]*".join(parts), output), f"{message}\n\nis not in\n\n{output[-3000:]}"


@pytest.fixture
def config(corpus: Path, prepared_data: None, tmp_path: Path) -> Path:
    return write_run_config(tiny_config(corpus), tmp_path / "tiny.json")


def myllm(*words: str | Path) -> str:
    done = warm_start.run("-m", "myllm", *words)
    assert done.returncode == 2, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("start", "code", "words"),
    [
        ("error: the run needs", 2, EVERY_STEP),
        ("the gradient of step", 65, ["--optim.max-lr", "1e38", "--optim.warmup-steps", "0"]),
        ("error: the data set ... has ... training", 2, ["--train.batch-tokens", "1048576"]),
        ("error: model.vocab_size", 2, ["--model.vocab-size", "1000"]),
    ],
)
def test_invalid_run_settings(start: str, code: int, words: list[str], config: Path) -> None:
    done = launch("--config", config, *words)
    assert done.returncode == code, done.stderr
    check(start, done.stderr + done.stdout)


def test_preflight_out_of_memory(config: Path) -> None:
    check("error: this run would fail:\n  - out of memory", myllm("preflight", "--config", config, *HUGE))


def test_out_of_memory_without_preflight(config: Path) -> None:
    """The machine refuses the memory, as a GPU does."""
    limit, embedding = 4 * 2**30, ("--model.d-model", "4096", "--model.n-heads", "32")
    words = command("--config", config, *embedding, "--train.micro-batch-size", "2")
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=240, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    check("error: out of memory on", done.stderr)


def test_cpu_out_of_memory(config: Path) -> None:
    words = ("--train.micro-batch-size", "100000", "--train.batch-tokens", "6400000")
    check("error: train.micro_batch_size", launch("--config", config, *words).stderr)


def test_too_little_text(tmp_path: Path, temp_data: Path) -> None:
    (tmp_path / "text.txt").write_text("too little")
    check("error: the source", myllm("data", "prepare", f"files:{tmp_path / 'text.txt'}"))


def test_no_network(temp_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    check("error: the Hub at", myllm("data", "prepare", "hub:some/texts"))


def test_gated_dataset(temp_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gated(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Gated) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        check("error: the Hub has no dataset", myllm("data", "prepare", "hub:some/texts"))
        server.shutdown()


def test_tokenizer_mismatch(config: Path, corpus: Path, temp_data: Path) -> None:
    warm_start.run("-m", "myllm", "tokenizer", "train", f"files:{corpus}", "--vocab-size", "300").check_returncode()
    (tokenizer,) = temp_data.glob("tokenizers/*/tokenizer.json")
    (dataset,) = (path.parent.name for path in temp_data.glob("datasets/*/manifest.json"))
    done = launch("--config", config, "--data.dataset", dataset, "--data.tokenizer", tokenizer)
    check("error: the data set ... was made with", done.stderr)


def test_model_mismatch_and_port_in_use(config: Path, taken_port: int) -> None:
    assert launch("--config", config).returncode == 0
    check("error: the checkpoint", launch("--config", config, "--model.n-layers", "3").stderr)
    assert status("tiny", 600)[1] == 0  # still complete
    check("error: cannot listen", myllm("serve", "tiny", "--port", str(taken_port)))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_rendezvous_port_in_use(config: Path, taken_port: int) -> None:
    words = ["-m", "myllm.distributed.elastic", f"--master_port={taken_port}", ROOT / "pretrain.py", "--config", config]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=240)
    assert done.returncode
    check("error: the machines cannot connect", done.stderr)


def test_torch_out_of_range(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    venv = machine.make_venv(tmp_path / "venv", torch="2.9.0")
    check("the active environment", machine.run(status=2, VIRTUAL_ENV=str(venv)))


def test_driver_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(FAKE_DRIVER)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check("NVIDIA's driver", cuda_problem() or "")


def test_stuck_rank(small: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "temp_data/runs/tiny"
    # No evaluations: a rank that is stuck in one is given half an hour.
    evals = replace(small.eval, validation_every_steps=0, cloze_every_steps=0, sample_every_steps=0)
    endless = with_train(small, max_steps=1_000_000, save_every_steps=0, collective_timeout_s=15.0)
    endless = replace(endless, eval=evals)
    config = write_run_config(endless, tmp_path / "endless.json")
    launcher = subprocess.Popen(command("--config", config, ranks=2), stderr=subprocess.PIPE, text=True)
    try:
        while not (run / "metrics.jsonl").exists() or '"train"' not in (run / "metrics.jsonl").read_text():
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.2)
        rank_0 = json.loads((run / "heartbeat.json").read_text())["pid"]
        ranks = with_words(psutil.Process(launcher.pid).children(), "pretrain.py")
        (rank_1,) = (process for process in ranks if process.pid != rank_0)
        rank_1.send_signal(signal.SIGSTOP)
        _, stderr = launcher.communicate(timeout=240)
    finally:
        launcher.kill()
    check("error: rank", stderr)


def test_all_messages_are_covered() -> None:
    provoked = set(re.findall(r'(?:check\(|^        \()"((?:[^"\\]|\\.)+)"', Path(__file__).read_text(), re.M))
    starts = [start.replace("\\n", "\n") for start in provoked]
    assert [message for message in MESSAGES if not any(message.startswith(start) for start in starts)] == []
