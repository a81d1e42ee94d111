"""The commands of README.md and docs/ are run, on a tiny model, made-up texts and a loopback Hub, or have a reason."""

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from conftest import ROOT, write_corpus
from support import warm_start
from support.hub_server import HubServer
from support.published_run import TOKEN
from support.serving import DEADLINE_S, serving
from support.tiny_presets import shrink, tiny_presets
from test_docs import FENCE, PAGES, simple_commands

from myllm import presets
from myllm.cli.main import main as myllm
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.inference.load import load_model
from myllm.inference.server.http import PageServer
from myllm.training.loop import train

pytestmark = pytest.mark.slow

REASONS = {
    r"git clone|this repository|cd$|its folder": "the repository is here already",
    r"docker |sky |report.html$": "needs Docker or a cloud",
    r"export |open-webui ": "needs Open WebUI: docs/experiments/generation.md has a run of it",
    r"tmux |rsync |brew |xcode-select |caffeinate |mail ": "needs another machine or program",
    r"pip install|pre-commit|src/environment.sh|source ": "changes the environment",
    r"make ": "runs the tests, or measures a GPU",
    r"(\w+=\S+ )*(nohup )?\./run_pre_training_e2e": "tests/test_e2e.py and tests/test_scripts.py run the scripts",
    r"(\w+=\S+ )*sbatch|scontrol": "needs Slurm; tests/test_slurm.py has a stand-in",
    r"torchrun|python -m myllm.distributed.elastic": "needs several machines: tests/distributed",
    r"python benchmarks/": "tests/benchmarks",
    r"(while|do|done|code=|line=|continue|break|echo|train.out|\[|1$)": "shell around a command",
    r"myllm (import|sample me/|data (estimate c4|prepare fineweb))": "reads the Hub: tests/hub, tests/data",
    r"python pretrain.py .*--init.from (gpt2|account|NAMESPACE)": "reads the Hub: tests/hub/test_import.py",
    r"myllm eval RUN --tasks arc-easy": "downloads tasks: tests/evals/test_tasks.py has them from a loopback Hub",
    r"myllm (tune|ladder)": "millions of tokens of text, or dozens of trainings: tests/cli/tune and tests/cli/ladder",
    r"myllm report .*--watch": "serves until Ctrl-C: tests/runs",
    r"tensorboard |myllm runs sync|python pretrain.py .*--train.trackers": "needs a tracker: tests/runs",
    r"python pretrain.py .*(:0\.\d|1/3)": "needs several data sets: tests/training/test_mixture_run.py",
    r"curl ": "test_documented_requests runs them",
    r"python docs/local_hub.py": "serves until Ctrl-C: tests/hub/test_local_hub.py",
}
"""Commands that are not run, and why."""
REAL_PRESETS = re.compile(r"myllm plan|.*--help|(?!.*--data).*--dry-run")
"""These train nothing, and read no data set: the one here suits the tiny presets."""
ADDED = {
    r"myllm serve": "--port 0",
    r"python pretrain.py .*--init.keep-optimizer": "--optim.optimizer adamw",  # that of the run here
    r"myllm runs (delete|archive)|myllm data delete": "--yes",
    r"myllm eval \w+( --tasks hellaswag.*)?$": f"--hellaswag-file {ROOT}/tests/evals/hellaswag_own.jsonl",
}
"""Options that keep a test apart from the machine that it runs on."""
REPLACED = {
    r"/path/to/(better/)?texts": "{texts}",
    r"--data.dataset (debug|my-texts)": "--data.dataset files-texts",
    r"my-texts-1a2b3c4d": "{dataset}",
    r"RUN/best": "debug/checkpoints/step_00000002",
    r"step_00004000": "step_00000002",
    r"RUN\b": "debug",
    r"--train.max-steps 500": "--train.max-steps 5",
    r"lr-2 baseline": "lr-2 debug",
    r"--stride 256": "--stride 16",
}
"""What stands for a name of the reader's own."""
RUNS = re.compile(r"\b(lf-llm-269m|small-50m|tinystories-laptop|my-run|lr-1|lr-2)\b")
NEEDS_RUN = re.compile(r"myllm (eval|report|checkpoint|status|runs|sample|chat|export)|python .*--init.from")


def documented() -> Iterator[object]:
    """The words of each command in a shell block, once."""
    seen = set()
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines() if language in ("sh", "bash") else ():
                for words in simple_commands(line.partition(" #")[0]):
                    text = shlex.join(words)
                    if text not in seen and not text.startswith("#"):
                        seen.add(text)
                        yield pytest.param(words, id=f"{page.stem}: {' '.join(words)}"[:90])


def link_or_copy(source: str, target: str) -> None:
    """Large files are replaced and never changed in place."""
    (os.link if source.endswith((".safetensors", ".bin")) else shutil.copy2)(source, target)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a temp_data/ with a data set and a run."""
    folder = tmp_path_factory.mktemp("world")
    write_corpus(folder / "texts")
    book = "\n\n".join(path.read_text() for path in sorted((folder / "texts").glob("00*.txt")))
    (folder / "book.txt").write_text(book)
    (folder / "prompts.txt").write_text("the river\nthe bridge\n")
    rows = "\n".join(json.dumps({"text": path.read_text()}) for path in sorted((folder / "texts").iterdir()))
    (folder / "docs.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYLLM_DATA", str(folder / "temp_data"))
        myllm(
            ["tokenizer", "train", f"files:{folder}/texts", "--vocab-size", "300", "--out", f"{folder}/tokenizer.json"]
        )
        config = shrink(presets.get_preset("debug"), folder / "texts")
        with process_group("cpu") as process:
            train(config, prepare(config.data, progress=False), process)
    return folder


@pytest.fixture
def desk(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    desk = tmp_path / "desk"
    shutil.copytree(world, desk, copy_function=link_or_copy, ignore=shutil.ignore_patterns("texts"))
    monkeypatch.chdir(desk)
    monkeypatch.setenv("MYLLM_DATA", str(desk / "temp_data"))
    return desk


def copy_run(name: str, data: Path) -> None:
    """A run of the name that a command gives."""
    run = data / "runs" / name
    shutil.copytree(data / "runs/debug", run, copy_function=link_or_copy)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "name": name}))


def run_myllm(words: list[str], texts: Path, real: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code."""

    def stop(server: PageServer) -> None:
        raise KeyboardInterrupt  # as the reader's Ctrl-C, once it serves

    monkeypatch.setattr(PageServer, "serve_forever", stop)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the river\n/quit\n"))  # for chat
    for name, make in ({} if real else tiny_presets(texts)).items():
        monkeypatch.setitem(presets.PRESETS, name, make)
    try:
        myllm(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("words", list(documented()))
def test_command(
    words: list[str], world: Path, desk: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    line = " ".join(words)
    if any(re.match(pattern, line) for pattern in REASONS):
        return
    for name in sorted(set(RUNS.findall(line))) if NEEDS_RUN.match(line) else ():
        copy_run(name, desk / "temp_data")
    if "runs/six" in line:
        copy_run("six", desk / "temp_data")
    if "publish" in line:
        request.getfixturevalue("hub")
    if "tokenizer train" in line:
        (desk / "tokenizer.json").unlink()
    if "data delete" in line:
        shutil.rmtree(desk / "temp_data/runs")  # a data set that a run needs is kept
    text, (dataset,) = shlex.join(words), (desk / "temp_data/datasets").glob("files-texts*")
    for pattern, replacement in REPLACED.items():
        text = re.sub(pattern, replacement.format(texts=world / "texts", dataset=dataset.name), text)
    text += "".join(f" {option}" for pattern, option in ADDED.items() if re.match(pattern, line))
    program, *rest = shlex.split(text)
    real = bool(REAL_PRESETS.match(line))
    if program == "myllm":
        code = run_myllm(rest, world / "texts", real, monkeypatch)
    else:
        assert (program, rest[0]) == ("python", "pretrain.py")
        start = [ROOT / "pretrain.py"] if real else ["-m", "support.tiny_presets", world / "texts"]
        done = warm_start.run(*start, *rest[1:])
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout
        return
    captured = capfd.readouterr()
    assert code == 0, captured.out + captured.err
    assert captured.out or "--out" in line


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on which the reader has an account."""
    with HubServer() as server, server.reached(monkeypatch, tmp_path / "hf"):
        server.models.add_account(TOKEN, "my-account", "me")
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf/token").write_text(TOKEN)
        yield server


def test_reasons_have_no_unused_patterns() -> None:
    lines = [" ".join(parameter.values[0]) for parameter in documented()]
    assert not [pattern for pattern in REASONS if not any(re.match(pattern, line) for line in lines)]


def test_screenshots_match_documented_images(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command draws every picture of README.md and docs/, but those of a search and a ladder are of other runs."""
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "docs/screenshots.py")
    screenshots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(screenshots)
    monkeypatch.setattr(screenshots, "ASSETS", tmp_path)
    copy_run("debug-muon", desk / "temp_data")
    screenshots.main()
    shown = {name for page in PAGES for name in re.findall(r"assets/(\w+\.png)", page.read_text(encoding="utf-8"))}
    assert {path.name for path in tmp_path.glob("*.png")} == {
        name for name in shown if not name.startswith(("tune_", "ladder_"))
    }


# -- requests and Python ----------------------------------------------------------------------------------------------


def blocks(language: str) -> list[object]:
    return [
        pytest.param(block, id=f"{page.stem}: {block.strip().splitlines()[0]}"[:60])
        for page in PAGES
        for kind, block in FENCE.findall(page.read_text(encoding="utf-8"))
        if kind == language
    ]


@pytest.mark.parametrize("block", [block for block in blocks("sh") if "curl " in block.values[0]])
def test_documented_requests(block: str, desk: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    with serving(load_model("debug")) as server:
        script = "set -e\n" + block.replace("http://127.0.0.1:8000", server.address).replace("curl ", "curl -fsS ")
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert '"choices"' in done.stdout


@pytest.mark.parametrize("block", blocks("python"))
def test_documented_python(
    block: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (dataset,) = (desk / "temp_data/datasets").glob("files-texts*")
    monkeypatch.setattr(sys, "argv", ["sample_digest.py", str(dataset), "0", "32", "128", "4"])
    block = block.replace("python-stdlib-0123456789ab", dataset.name).replace("step_00000600", "step_00000004")
    with serving(load_model("debug")) as server:
        server.models["debug"] = server.models.pop("a <model>")
        exec(block.replace("http://127.0.0.1:8000", server.address), {})
    assert capfd.readouterr().out
