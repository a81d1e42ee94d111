"""A machine that is lost in the middle of a copy, with two ranks that hold slices of every tensor (FSDP)."""

import contextlib
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import command, launch, losses, with_train, write_run_config
from support.s3_server import S3Server

from myllm.checkpoint.integrity import verify_checkpoint
from myllm.config import CheckpointConfig, RunConfig


@pytest.mark.slow
def test_resume_elsewhere_after_kill_during_mirroring(
    small: RunConfig, tmp_path: Path, temp_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL for every process, with half a checkpoint in the mirror: elsewhere the run goes on from the one before,
    bit for bit as if nothing had happened."""
    s3 = S3Server(monkeypatch)
    copied, held = "", False

    def hold(received: bytes) -> bool:
        nonlocal copied, held
        held = held or (bool(copied) and b"PUT /bucket/" in received and b"/optimizer/" in received)
        if b"PUT /bucket/" in received and b"/manifest.json" in received and not held:
            copied = received.split(b"/checkpoints/")[1].split(b"/")[0].decode()
        return held

    s3.hold = hold
    level = replace(small, optim=replace(small.optim, schedule="wsd", decay_fraction=0.001))
    endless = with_train(level, parallel="fsdp", max_steps=10_000, save_every_steps=20, keep_last=0)
    no_evals = replace(endless.eval, validation_every_steps=0, cloze_every_steps=0, sample_every_steps=0)
    endless = replace(endless, eval=no_evals, checkpoint=CheckpointConfig("s3://bucket"))
    config = write_run_config(endless, tmp_path / "config.json")
    with subprocess.Popen(command("--config", config, ranks=2), stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 300
            while not held:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
        finally:
            for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its parent
                    child.kill()
    s3.hold = lambda received: False
    whole = int(copied.removeprefix("step_"))
    folders = {name.split("/")[2] for name in s3.names() if "/checkpoints/" in name}
    with_manifest = {name.split("/")[2] for name in s3.names() if name.endswith("/manifest.json")}
    assert with_manifest == {copied}
    assert len(folders) == 2

    words = ("--config", config, "--train.max-steps", str(whole + 8))
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path / "new"))
    done = launch(*words, ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"fetching step {whole} from the mirror s3://bucket/tiny" in done.stdout.replace(",", "")
    run = tmp_path / "new/runs/tiny"
    fetched = run / "checkpoints" / copied
    assert not list(verify_checkpoint(fetched))
    assert {path.name for path in (fetched / "weights").iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert f"{whole + 8:,}" in (run / "log.txt").read_text().partition("mirrored step ")[2]
    s3.stop()
    monkeypatch.setenv("MYLLM_DATA", str(temp_data))
    assert launch(*words, "--name", "undisturbed", "--checkpoint.mirror", "None", ranks=2).returncode == 0
    assert losses(run) == losses(temp_data / "runs/undisturbed")
    assert json.loads((run / "config.json").read_text())["checkpoint"]["mirror"] == "s3://bucket"
