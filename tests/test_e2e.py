"""The debug script as a newcomer runs it, cut short, and every command that its last lines name."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, eval_rows, train_rows
from support import warm_start
from test_notebooks import execute, outputs

SHORT = [
    "--train.max-steps", "4", "--train.log-every-steps", "1", "--train.save-every-steps", "2",
    "--eval.validation-tokens", "1024", "--eval.cloze-examples", "8", "--eval.sample-new-tokens", "8",
]  # fmt: skip


def elsewhere(folder: Path) -> Path:
    """Where the user stands: in another folder than the code and the data."""
    place = folder / "where the user stands"
    place.mkdir(parents=True, exist_ok=True)
    return place


def user(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command typed with no network to speak of."""
    environment = os.environ | {"MYLLM_DATA": str(folder / "data"), "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    return subprocess.run(
        words, cwd=elsewhere(folder), env=environment, capture_output=True, text=True, timeout=1_000, check=False
    )


def python(folder: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MYLLM_DATA": str(folder / "data")}
    return warm_start.run(*words, env=environment, cwd=elsewhere(folder), stdin=stdin)


def myllm(folder: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "myllm", *words, stdin=stdin)


@pytest.fixture(scope="module")
def debug(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("e2e")
    return folder, user(folder, str(ROOT / "run_pre_training_e2e_debug.sh"), *SHORT)


def test_debug_script_end_to_end(debug: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = debug
    assert done.returncode == 0, done.stderr
    run = folder / "data/runs/debug"
    assert [row["step"] for row in train_rows(run)] == [1, 2, 3, 4]
    assert abs(eval_rows(run, "validation")[0]["loss"] - 10.82) < 0.2  # ln(50,257): it knows nothing yet
    assert eval_rows(run, "validation")[-1]["loss"] < eval_rows(run, "validation")[0]["loss"]
    assert eval_rows(run, "cloze")
    assert len((run / "samples.jsonl").read_text().splitlines()) == 8  # four prompts, before and after
    for name in ("config.json", "environment.json", "log.txt", "report.html", "plots/loss.png"):
        assert (run / name).stat().st_size > 100, name
    for step in ("step_00000002", "step_00000004"):
        assert (run / "checkpoints" / step / "manifest.json").is_file()
    stdout = done.stdout
    assert [line for line in stdout.splitlines() if line.startswith("=== ")] == [
        "=== Environment", "=== Plan: debug", "=== Preflight", "=== Data, training, evaluation and report"
    ]  # fmt: skip
    assert "preflight of debug on 1 x" in stdout
    last = stdout.split("everything of this run")[1].replace("'", "")  # a path with spaces is quoted
    assert "myllm serve debug" in last
    for hint in (str(run), "myllm sample debug", "myllm chat debug", "--train.max-steps", "run_pre_training_e2e.sh"):
        assert hint in last


def test_repeated_command_resumes(debug: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = debug
    run = folder / "data/runs/debug"
    before = train_rows(run)
    done = user(folder, str(ROOT / "run_pre_training_e2e_debug.sh"), *SHORT)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert "nothing left to train: debug is at step 4 of 4" in done.stdout
    assert train_rows(run) == before
    assert len(list((folder / "data/datasets").glob("*/manifest.json"))) == 1


def test_sampling(debug: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = debug
    words = ("sample", "debug", "--prompt", "import os", "--max-new-tokens", "5", "--device", "cpu")
    first, second = myllm(folder, *words), myllm(folder, *words)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout  # the same seed, the same text
    assert first.stdout.count("import os") == 3
    assert myllm(folder, *words, "--seed", "9").stdout != first.stdout
    checkpoint = str(folder / "data/runs/debug/checkpoints/step_00000002")
    assert myllm(folder, "sample", checkpoint, "--max-new-tokens", "2", "--device", "cpu").returncode == 0


def test_chatting(debug: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = debug
    typed = "import sys\n/temperature 0\n/temperature much\ndef f(\n/reset\n/what\n/quit\nnever read\n"
    done = myllm(folder, "chat", "debug", "--max-new-tokens", "4", "--device", "cpu", stdin=typed)
    assert done.returncode == 0, done.stderr
    assert "it continues your text and does not answer questions" in done.stdout
    for answer in ("temperature 0.0", "'much' is not a temperature", "text cleared", "unknown command /what"):
        assert answer in done.stdout


def test_report_and_verify(debug: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = debug
    (folder / "data/runs/debug/report.html").unlink()
    done = myllm(folder, "report", "debug")
    assert done.returncode == 0, done.stderr
    assert (folder / "data/runs/debug/report.html").is_file()
    assert "match the manifest" in myllm(folder, "data", "verify", "python-stdlib").stdout
    shard = next((folder / "data/datasets").glob("*/train_00000.npy"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = myllm(folder, "data", "verify", "python-stdlib")
    assert done.returncode == 2
    assert "train_00000.npy" in done.stderr
    content[-1] ^= 1
    shard.write_bytes(content)


def test_metric_notebook_draws_run(
    debug: tuple[Path, subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = debug
    monkeypatch.setenv("MYLLM_DATA", str(folder / "data"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = execute(ROOT / "notebooks/metric_graphs.ipynb", {"RUN": "debug", "RUNS": ["debug"]}, folder)
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) >= 5


def test_prepare_and_train_on_own_text(tmp_path: Path, corpus: Path) -> None:
    done = myllm(tmp_path, "data", "prepare", f"files:{corpus}", "--val-tokens", "2000", "--workers", "1")
    assert done.returncode == 0, done.stderr
    name = done.stdout.splitlines()[0].split("/")[-1]
    assert f"--data.dataset {name}" in done.stdout
    words = ["--train.max-steps", "2", "--eval.validation-tokens", "1024", "--eval.sample-every-steps", "0"]
    done = python(tmp_path, str(ROOT / "pretrain.py"), "debug", "--data.dataset", name, *words)
    assert done.returncode == 0, done.stderr
    environment = json.loads((tmp_path / "data/runs/debug/environment.json").read_text())
    assert environment["dataset"] == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("smaple", "debug"), "unknown command 'smaple', did you mean 'sample'"),
        (("data", "prepair", "x"), "unknown command 'data prepair', did you mean 'data prepare'"),
        (("sample", "nothing"), "no checkpoint at 'nothing'"),
        (("report", "nothing"), "nothing"),
        (("data", "verify", "nothing"), "no prepared data set 'nothing'"),
        (("data", "prepare", "python-stdlb"), "did you mean 'python-stdlib'"),
        (("data", "prepare", "python-stdlib", "--val-tokens", "0"), "data.val_tokens is 0"),
        (("sample",), ""),
    ],
)
def test_user_errors_exit_with_code_2(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = myllm(tmp_path, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_production_script_without_gpu_reports_cause(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'Driver Version: 470.82.01  CUDA Version: 11.4'\n")
    smi.chmod(0o755)
    done = user(tmp_path, "env", f"PATH={smi.parent}:{os.environ['PATH']}", str(ROOT / "run_pre_training_e2e.sh"))
    assert done.returncode == 2
    assert "torch cannot use the GPUs here: NVIDIA's driver 470.82.01 is installed, for CUDA up to 11.4" in done.stderr
    assert "lf-llm-269m on 8 x A100-80 (DDP)" in done.stdout
    assert "320,145,408 in all" in done.stdout
    assert "--force" in done.stderr
    assert not (tmp_path / "data").exists()
