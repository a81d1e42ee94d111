"""What many tests need: a small corpus, a tiny config, and a temp_data/ of their own."""

import atexit
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from myllm.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, to_dict
from myllm.data.prepare.prepare import prepare

# Caches and settings of the tests' own: another program's font list, a user's token, runs or compiled kernels must not
# decide a test. The first process of a run makes the folder; xdist's workers and all children inherit it.
if "MYLLM_TESTS_HOME" not in os.environ:
    home = tempfile.mkdtemp(prefix="myllm-tests-home-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ["MYLLM_TESTS_HOME"] = home
for variable, folder in {
    "HOME": "", "XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "inductor", "IPYTHONDIR": "ipython",
    "JUPYTER_CONFIG_DIR": "jupyter", "MYLLM_DATA": "temp_data",
}.items():  # fmt: skip
    os.environ[variable] = str(Path(os.environ["MYLLM_TESTS_HOME"], folder))
for variable in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "MPLBACKEND", "MATPLOTLIBRC"):
    os.environ.pop(variable, None)
# For this process's children too: the models here are too small to share out, and the tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Compiling in the process itself: one thing less that can be left behind.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Rewriting the asserts of all tests takes 10 s in each of xdist's workers, unless what the first wrote may be kept.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # ignored under nohup, and children would inherit that
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# How long an example takes says more about the machine than about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
from support import warm_start  # noqa: E402  (keeps the environment that it finds)

# The fixture `save`.
pytest_plugins = ["support.saved_checkpoints"]
ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILES = (
    "test_readme.py", "distributed/test_stops.py", "faults/test_saves_cut_short.py", "distributed/test_parallelize.py",
    "hub/test_background_publish.py", "test_troubleshooting.py", "data/test_growing.py", "benchmarks/test_gpu_check.py",
    "distributed/test_two_machines.py", "distributed/test_elastic_processes.py", "hub/test_large_vocabularies.py",
    "training/preflight/test_rehearsal.py", "test_e2e.py", "training/test_loop.py", "runs/mirror/test_lost_machine.py",
    "cli/test_trials.py", "faults/test_ranks_killed.py", "cli/ladder/test_ladder.py", "training/test_stop_signals.py",
    "cli/test_prove_resume.py", "training/test_compiled_step.py", "faults/test_damage.py",
)  # fmt: skip
WORDS = (
    "the river ran under old stone bridge while children counted boats and sang of salt wind light harbour evening "
    "bread copper lantern winter market song letter garden narrow window quiet morning voice paper road hill"
)


def write_corpus(folder: Path, documents: int = 60, words: int = 300) -> Path:
    """Documents of made-up prose, the same every time."""
    chance, vocabulary = random.Random(7), WORDS.split()
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join(chance.choice(vocabulary) + chance.choice(["", "", "", ",", ".", "\n"]) for _ in range(words))
        (folder / f"{number:03d}.txt").write_text(f"Chapter {number}\n\n{text}\n", encoding="utf-8")
    return folder


def write_corpora(folder: Path, **documents: int) -> list[str]:
    """Sources with different documents, in folders of these names."""
    files, sources = sorted(write_corpus(folder / "all", sum(documents.values())).iterdir()), []
    for name, count in documents.items():
        (folder / name).mkdir()
        for path in files[:count]:
            path.rename(folder / name / path.name)
        files = files[count:]
        sources.append(f"files:{folder / name}")
    return sources


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker takes whole files: those that take longest begin first, and then those with the most tests."""
    first = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST_FILES)}
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (first.get(item.path, len(first)), -counts[item.path], item.path))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def temp_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temp_data/ that the test has to itself."""
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path / "temp_data"))
    return tmp_path / "temp_data"


def prepare_in(folder: Path, config: RunConfig) -> Path:
    """Make this temp_data/ with the data set of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYLLM_DATA", str(folder))
        prepare(config.data, progress=False)
    return folder


@pytest.fixture(scope="session")
def prepared_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temp_data/ with the data set of `tiny`, prepared once in each process that runs tests."""
    return prepare_in(tmp_path_factory.mktemp("prepared"), tiny_config(corpus))


@pytest.fixture(scope="session")
def prepared_small_vocabulary(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `prepared_corpus`, of `small`."""
    return prepare_in(tmp_path_factory.mktemp("small"), with_small_vocabulary(tiny_config(corpus)))


@pytest.fixture
def prepared_data(prepared_corpus: Path, temp_data: Path) -> None:
    """The test's temp_data/ has the data set of `tiny` already."""
    shutil.copytree(prepared_corpus, temp_data, dirs_exist_ok=True)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group that has this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def tiny(corpus: Path, temp_data: Path) -> RunConfig:
    return tiny_config(corpus)


@pytest.fixture
def small(corpus: Path, prepared_small_vocabulary: Path, temp_data: Path) -> RunConfig:
    """`tiny` with a small vocabulary, for runs of many steps or starts; its data are prepared."""
    shutil.copytree(prepared_small_vocabulary, temp_data, dirs_exist_ok=True)
    return with_small_vocabulary(tiny_config(corpus))


def tiny_config(corpus: Path) -> RunConfig:
    """A run that takes a second: every part is there, dropout too, so that random state matters."""
    return RunConfig(
        name="tiny",
        model=ModelConfig(
            max_seq_len=64, d_model=16, n_layers=2, n_heads=2, d_ff=32, qk_norm=True, dropout_embedding=0.1,
            dropout_attention_residual=0.1, dropout_ffn=0.1,
        ),
        data=DataConfig(source=f"files:{corpus}", val_tokens=3_000, shard_tokens=4_000, workers=1),
        optim=OptimConfig(max_lr=3e-3, warmup_steps=3, schedule="linear"),
        train=TrainConfig(
            max_steps=12, batch_tokens=128, micro_batch_size=1, log_every_steps=1, save_every_steps=4, device="cpu"
        ),
        eval=EvalConfig(
            validation_every_steps=6, validation_tokens=256, cloze_every_steps=12, cloze_examples=8,
            hellaswag_every_steps=0, sample_every_steps=12, sample_prompts=("the river",), sample_new_tokens=8,
        ),
    )  # fmt: skip


def with_train(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def with_small_vocabulary(config: RunConfig) -> RunConfig:
    """With 300 tokens, learned from the run's own text: GPT-2's 50,257 logits are half of a tiny run."""
    model, data = replace(config.model, vocab_size=300), replace(config.data, tokenizer="train:300")
    return replace(config, model=model, data=data)


def write_run_config(config: RunConfig, path: Path) -> Path:
    path.write_text(json.dumps(to_dict(config)), encoding="utf-8")
    return path


def launch(
    *words: str | Path, ranks: int = 1, timeout: float = 240, report: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run pretrain.py as a user would, alone or on several ranks; but no report is drawn at the end unless told."""
    program, ranks_or_none = ROOT / "pretrain.py", ranks if ranks > 1 else None
    return warm_start.run(program, *words, ranks=ranks_or_none, timeout=timeout, report=report)


def command(*words: str | Path, ranks: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, str(ROOT / "pretrain.py"), *map(str, words)]


def train_rows(run: Path) -> list[dict[str, float]]:
    """The training rows of a run's metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def eval_rows(run: Path, name: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "eval" and row["name"] == name]


def losses(run: Path) -> dict[int, float]:
    """Loss by step; a step that was written twice fails."""
    rows = train_rows(run)
    assert len({row["step"] for row in rows}) == len(rows), "a step was logged twice"
    return {int(row["step"]): row["loss"] for row in rows}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _frozen_heap() -> None:
    """A run in the tests' process collects garbage several times, and would look at a million objects of pytest's."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's variables around the tests are not theirs."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert "RANK" not in os.environ
