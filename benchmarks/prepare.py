"""Data preparation end to end, against bare tiktoken and against the common loop of one document a pool task.

    python benchmarks/prepare.py [--mb 150] [--processes 1 2] [--rounds 3] [--kind parquet]

All three get the same text and the same number of processes, in turn, `rounds` times:

- bare: the text lies in each process's memory already; `encode_ordinary`, nothing is kept. The clock starts when all
  processes are ready.
- prepare: what `myllm data prepare` does, from the start of the call: start workers, read and unpack the file,
  tokenize, hash, hold out validation, write shards, fsync, manifest.
- loop: `Pool.imap(tokenize, documents)`, chunksize 1 and 16, each document back to one process as a uint16 array, which
  fills and saves shards. Source of the shape: karpathy/build-nanogpt, fineweb.py.

Prints a Markdown table, and the peak memory of a worker. A ratio is the median of the rounds' own ratios.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str

from myllm.config import DataConfig
from myllm.data.prepare.prepare import prepare
from myllm.data.sources.readers import split_prose
from myllm.data.tokenizer.load import load_tokenizer

SHARD_TOKENS = 20_000_000
DOCUMENT_CHARS = 3_000  # about the mean of FineWeb-Edu


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--mb", type=float, default=150, help="megabytes of text")
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--kind", choices=["parquet", "jsonl.gz", "jsonl"], default="parquet")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MYLLM_DATA"] = str(folder / "temp_data")
        texts = write_corpus(folder / "corpus", options.mb * 1e6, options.kind, max(options.processes))
        ways: dict[str, Callable[[int], float]] = {
            "bare tiktoken": lambda n: bare(texts, n),
            "myllm data prepare": lambda n: ours(folder / "corpus", n),
            "pool loop, 1 document a task": lambda n: loop(folder / "corpus", options.kind, n, 1),
            "pool loop, chunks of 16": lambda n: loop(folder / "corpus", options.kind, n, 16),
        }
        n_bytes = sum(len(text.encode()) for text in texts)
        files = len(list((folder / "corpus").iterdir()))
        print(f"{n_bytes / 1e6:,.0f} MB of text in {len(texts):,} documents, {files} {options.kind} file(s)")
        print(f"{device_name_of_cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
        print("| processes | way | MB/s, median | least | greatest | of bare | prepare to this |\n|" + "---|" * 7)
        for n in options.processes:
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(options.rounds):  # interleaved: a machine's speed drifts
                for way, run in ways.items():
                    rates[way].append(n_bytes / 1e6 / run(n))
            for way, found in rates.items():
                middle = statistics.median(found)
                of_bare = statistics.median(a / b for a, b in zip(found, rates["bare tiktoken"], strict=True))
                ours_to = statistics.median(a / b for a, b in zip(rates["myllm data prepare"], found, strict=True))
                spread = f"{middle:.2f} | {min(found):.2f} | {max(found):.2f}"
                print(f"| {n} | {way} | {spread} | {of_bare:.0%} | {ours_to:.2f} |", flush=True)
        print(f"\npeak memory of a worker of `prepare`: {PEAK[0] / 1e6:,.0f} MB")
        print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB")


PEAK = [0]


def device_name_of_cpu() -> str:
    import torch

    from myllm.distributed.device_info import device_name

    return device_name(torch.device("cpu"))


def write_corpus(folder: Path, n_bytes: float, kind: str, files: int) -> list[str]:
    """The text that every Python carries, in documents, over and over in another order each time."""
    folder.mkdir()
    root = Path(sysconfig.get_path("stdlib"))
    sources = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(root.glob("*.py"))]
    pieces = [piece for text in sources for piece in split_prose(text, DOCUMENT_CHARS)]
    chance, texts, size = np.random.default_rng(0), [], 0
    while size < n_bytes:
        texts.append(pieces[int(chance.integers(len(pieces)))])
        size += len(texts[-1])
    for number in range(files):
        part = texts[number::files]
        if kind == "parquet":
            table = pa.table({"text": part, "id": list(range(len(part)))})
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=1_000, compression="snappy")
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
            (folder / f"{number}.{kind}").write_bytes(gzip.compress(lines, 6) if kind.endswith("gz") else lines)
    return texts


# -- the three ways ---------------------------------------------------------------------------------------------------


def bare(texts: list[str], n: int) -> float:
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(n + 1), context.Queue()
    processes = [context.Process(target=_encode_all, args=(texts[i::n], ready, seconds)) for i in range(n)]
    for process in processes:
        process.start()
    ready.wait()
    started = time.perf_counter()
    for _ in processes:
        seconds.get()
    elapsed = time.perf_counter() - started
    for process in processes:
        process.join()
    return elapsed


def tiktoken_itself() -> tiktoken.Encoding:
    """r50k_base as tiktoken makes it, of the same file."""
    ranks = load_tiktoken_bpe(str(load_tokenizer().file))
    return tiktoken.Encoding(
        "r50k_base", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50_256}
    )


def _encode_all(texts: list[str], ready: threading.Barrier, seconds: "multiprocessing.Queue[float]") -> None:
    encode = tiktoken_itself().encode_ordinary
    ready.wait()
    for text in texts:
        encode(text)
    seconds.put(0.0)


def ours(corpus: Path, n: int) -> float:
    shutil.rmtree(os.environ["MYLLM_DATA"], ignore_errors=True)
    watching = threading.Event()
    watcher = threading.Thread(target=_watch_memory, args=(watching,), daemon=True)
    watcher.start()
    started = time.perf_counter()
    prepare(DataConfig(source=f"files:{corpus}", shard_tokens=SHARD_TOKENS, workers=n), progress=False)
    elapsed = time.perf_counter() - started
    watching.set()
    watcher.join()
    return elapsed


def _watch_memory(done: threading.Event) -> None:
    while not done.wait(0.5):
        for child in psutil.Process().children():
            try:
                PEAK[0] = max(PEAK[0], child.memory_info().rss)
            except psutil.Error:
                continue


def loop(corpus: Path, kind: str, n: int, chunksize: int) -> float:
    started = time.perf_counter()
    shard, filled, number = np.empty(SHARD_TOKENS, dtype=np.uint16), 0, 0
    with multiprocessing.get_context("spawn").Pool(n) as pool:
        for tokens in pool.imap(_tokenize, _read(corpus, kind), chunksize=chunksize):
            while len(tokens):
                part = tokens[: SHARD_TOKENS - filled]
                shard[filled : filled + len(part)] = part
                filled, tokens = filled + len(part), tokens[len(part) :]
                if filled == SHARD_TOKENS:
                    np.save(corpus.parent / f"loop_{number}.npy", shard)
                    filled, number = 0, number + 1
    np.save(corpus.parent / f"loop_{number}.npy", shard[:filled])
    return time.perf_counter() - started


def _read(corpus: Path, kind: str) -> Iterator[str]:
    for path in sorted(corpus.iterdir()):
        if kind == "parquet":
            for batch in pq.ParquetFile(path).iter_batches(1_000, columns=["text"]):
                yield from batch.column(0).to_pylist()
        else:
            with gzip.open(path) if kind.endswith("gz") else path.open("rb") as lines:
                yield from (json.loads(line)["text"] for line in lines)


def _tokenize(text: str) -> np.ndarray:
    global _ENCODE
    if _ENCODE is None:
        _ENCODE = tiktoken_itself().encode_ordinary
    return np.array([50_256, *_ENCODE(text)], dtype=np.uint16)


_ENCODE = None

if __name__ == "__main__":
    main()
