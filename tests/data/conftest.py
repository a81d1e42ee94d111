"""What the data tests share: a vocabulary read by other means, data sets made by hand, and work done in process."""

import contextlib
import glob
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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiktoken
from support.hub_server import HubServer
from support.processes import with_words
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str

from myllm.data.dataset import Dataset
from myllm.data.prepare import workers
from myllm.data.tokenizer.gpt2 import SHIPPED_VOCABULARY
from myllm.data.tokenizer.load import load_tokenizer

MakeDataset = Callable[..., Dataset]


@pytest.fixture(scope="session")
def reference() -> tiktoken.Encoding:
    """r50k_base as tiktoken itself would build it, from the file that ships with the package."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # no cache
    try:
        ranks = load_tiktoken_bpe(str(SHIPPED_VOCABULARY))
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR")
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
    return tiktoken.Encoding(
        "reference", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50_256}
    )


@cache
def _vocabulary() -> dict[str, Any]:
    return load_tokenizer().describe()


def write_manifest(
    folder: Path, shards: list[dict[str, Any]], name: str = "manifest.json", **vocabulary: object
) -> None:
    """A manifest, or the list of what is there so far, put in its place in one step."""
    manifest = {
        "fingerprint": "f" * 64, "format": "myllm-shards-4", "source": "made-by-hand", "dtype": "uint16",
        "tokenizer": _vocabulary() | vocabulary, "shards": shards,
        "progress": {"done_bytes": len(shards), "source_bytes": 100},
    }  # fmt: skip
    (folder / f"{name}.new").write_text(json.dumps(manifest))
    (folder / f"{name}.new").replace(folder / name)


class Growing:
    """The folder of a finished data set as it was while it was being made: its shards go on the list one by one."""

    def __init__(self, whole: Dataset, folder: Path) -> None:
        self.folder, self._shards = folder, json.loads((whole.folder / "manifest.json").read_text())["shards"]
        for path in whole.folder.glob("*.npy"):
            os.link(path, folder / path.name)
        self.there = 0

    def grow(self, shards: int = 1) -> None:
        self.there += shards
        write_manifest(self.folder, self._shards[: self.there], "progress.json")

    def finish(self) -> None:
        write_manifest(self.folder, self._shards)
        (self.folder / "progress.json").unlink(missing_ok=True)

    @property
    def whole(self) -> bool:
        return self.there >= len(self._shards)


@pytest.fixture(scope="session")
def make_growing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Dataset], Growing]:
    return lambda whole: Growing(whole, tmp_path_factory.mktemp("growing"))


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory: pytest.TempPathFactory) -> MakeDataset:
    """A data set from token arrays, written with NumPy alone."""

    def make(train: np.ndarray, val: np.ndarray, shard_tokens: int = 1 << 30) -> Dataset:
        folder = tmp_path_factory.mktemp("dataset")
        shards, wide = [], max(train.max(initial=0), val.max(initial=0)) > 65_535
        for split, tokens in (("val", val), ("train", train)):
            for number, start in enumerate(range(0, len(tokens), shard_tokens)):
                path = folder / f"{split}_{number:05d}.npy"
                part = np.asarray(tokens[start : start + shard_tokens], dtype=np.uint32 if wide else np.uint16)
                np.save(path, part)
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                documents = int((part == 50_256).sum())
                shard = {"file": path.name, "split": split, "tokens": len(part), "documents": documents}
                shards.append(shard | {"sha256": digest})
        write_manifest(folder, shards, vocab_size=151_669 if wide else 50_257)
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

    _processes = None  # of a ProcessPoolExecutor that has not started any

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
    monkeypatch.setattr(workers, "ProcessPoolExecutor", InProcess)


PREPARE = """
import json, sys
from myllm.config import DataConfig
from myllm.data.prepare import work_items
from myllm.data.prepare.multi_machine import prepare_worker_shard
from myllm.data.prepare.prepare import prepare
from myllm.errors import UserError
settings = json.loads(sys.argv[1])
work_items.SMALL_BYTES = settings.pop("small_bytes", work_items.SMALL_BYTES)
part = settings.pop("part", None)
try:
    prepare_worker_shard(DataConfig(**settings), part) if part else prepare(DataConfig(**settings))
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
        """Prepare with these settings of DataConfig, after some lines of Python.

        Also of `part`, and `small_bytes`: how much text makes a unit.
        """
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
        return with_words(self.processes(), "--multiprocessing-fork")

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.005)

    @property
    def folder(self) -> Path:
        """The one data set that there is, or is going to be."""
        [folder] = [path for path in self.datasets.glob("*") if path.suffix != ".lock"]
        return folder

    def seen(self, pattern: str) -> list[Path]:
        """Files in the folder of a data set, by a pattern. Unlike Path.glob, this lets folders vanish meanwhile."""
        return [Path(path) for path in glob.glob(f"{glob.escape(str(self.datasets))}/[!.]*/{pattern}")]

    def writes_tokens(self) -> bool:
        """A worker has written some tokens of an item that it has not finished."""
        for path in self.seen("work/.*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # it is finished by now
                if path.stat().st_size:
                    return True
        return False

    def kill(self, process: subprocess.Popen[str], whom: str = "parent") -> None:
        """SIGKILL: the parent, the whole group, or one worker, which ends the parent too."""
        if whom == "worker" and (workers := self.workers()):
            with contextlib.suppress(psutil.Error):
                workers[0].kill()
        elif whom == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait(timeout=240)  # and not for its orphans, which end a moment later: the next one has to bear them

    def end(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self._started:
            process.communicate(timeout=240)


@pytest.fixture
def preparations(temp_data: Path) -> Iterator[Preparations]:
    found = Preparations(temp_data)
    yield found
    found.end()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, temp_data: Path) -> Iterator[HubServer]:
    """A Hub on loopback, which this process's client reaches."""
    with HubServer() as server, server.reached(monkeypatch, tmp_path / "home"):
        yield server


@pytest.fixture
def started(hub: HubServer, request: pytest.FixtureRequest) -> Preparations:
    """The fixture `preparations`, whose processes inherit the address of the Hub."""
    return request.getfixturevalue("preparations")


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
