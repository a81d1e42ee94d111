"""What the data tests share: a vocabulary read by other means, data sets made by hand, and work done in process."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str

from myllm import paths
from myllm.data import prepare as preparing
from myllm.data.shards import Dataset

MakeDataset = Callable[..., Dataset]


@pytest.fixture(scope="session")
def reference() -> tiktoken.Encoding:
    """r50k_base as tiktoken itself would build it, from the file in assets/."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # no cache
    try:
        ranks = load_tiktoken_bpe(str(paths.assets() / "r50k_base.tiktoken"))
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR")
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
    return tiktoken.Encoding(
        "reference", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50_256}
    )


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory: pytest.TempPathFactory) -> MakeDataset:
    """A data set from token arrays, written with NumPy alone."""

    def make(train: np.ndarray, val: np.ndarray, shard_tokens: int = 1 << 30) -> Dataset:
        folder = tmp_path_factory.mktemp("dataset")
        shards = []
        for split, tokens in (("val", val), ("train", train)):
            for number, start in enumerate(range(0, len(tokens), shard_tokens)):
                path = folder / f"{split}_{number:05d}.npy"
                part = np.asarray(tokens[start : start + shard_tokens], dtype=np.uint16)
                np.save(path, part)
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                shards.append({"file": path.name, "split": split, "tokens": len(part), "sha256": digest})
        manifest = {"format": "myllm-shards-1", "shards": shards}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return Dataset.open(folder)

    return make


@pytest.fixture(scope="session")
def mixed_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 400 documents in 5 JSONL files, with copies, empty ones, and letters of many scripts among them."""
    folder = tmp_path_factory.mktemp("mixed") / "mixed"
    folder.mkdir()
    chance = random.Random(1)
    words = ["the", "old", "river", "ran", "été", "Straße", "日本語", "🙂", "<|endoftext|>", "3.14", "def", "x\n\n"]
    texts = [" ".join(chance.choices(words, k=chance.randint(1, 200))) for _ in range(400)]
    texts += ["", " \n\t ", *chance.choices(texts, k=40)]
    chance.shuffle(texts)
    for number in range(5):
        lines = [json.dumps({"text": text}) for text in texts[number::5]]
        (folder / f"part{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


class InProcess(Executor):
    """Does a task when it is handed in: for tests of what is done, not of who does it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "ProcessPoolExecutor", InProcess)


PREPARE = """
import json, sys
from myllm.config import DataConfig
from myllm.data.prepare import prepare
from myllm.errors import UserError
try:
    prepare(DataConfig(**json.loads(sys.argv[1])))
except UserError as error:
    sys.exit(f"user error: {error}")
"""


class Preparations:
    """Preparations in processes of their own, all in one temp_data/."""

    def __init__(self, temp_data: Path) -> None:
        self.datasets = temp_data / "datasets"
        self._environment = {**os.environ, "MYLLM_DATA": str(temp_data)}
        self._started: list[subprocess.Popen[str]] = []

    def start(self, setup: str = "", **settings: object) -> subprocess.Popen[str]:
        """Prepare with these settings of DataConfig, after some lines of Python."""
        return self.python("-c", setup + PREPARE, json.dumps(settings))

    def python(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *words],
            env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        """Everything alive that belongs to this temp_data/: preparations, their workers, and orphans."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MYLLM_DATA") == self._environment["MYLLM_DATA"]:
                    found.append(process)
            except psutil.Error:  # ended, a zombie, or not ours
                continue
        return [process for process in found if process.pid != os.getpid()]

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "--multiprocessing-fork" in process.cmdline()]

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.005)

    def left(self) -> list[str]:
        """What the folder of data sets holds, but the locks, which stay."""
        return sorted(path.name for path in self.datasets.glob("*") if path.suffix != ".lock")

    def end(self) -> None:
        for process in self.processes():
            process.send_signal(signal.SIGKILL)
        for process in self._started:
            process.communicate()


@pytest.fixture
def preparations(temp_data: Path) -> Iterator[Preparations]:
    found = Preparations(temp_data)
    yield found
    found.end()


def file_hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, with its sha256."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def hashes() -> Callable[[Path], dict[str, str]]:
    return file_hashes
