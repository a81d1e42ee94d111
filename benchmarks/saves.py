"""How long training waits for a checkpoint, and how long the checkpoint takes.

python benchmarks/saves.py [PRESET]      writes and removes a few checkpoints in a temporary folder
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from myllm import presets
from myllm.checkpoint.async_saver import AsyncSaver
from myllm.checkpoint.format import load_latest
from myllm.checkpoint.state import TrainState
from myllm.data.sampler import DataPosition
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed.collectives import process_group
from myllm.formatting import format_bytes
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.paths import RunPaths


def main(preset: str, rounds: int) -> None:
    config = presets.PRESETS[preset]()
    with TemporaryDirectory() as folder, process_group("auto") as process:
        run = RunPaths(Path(folder))
        model = Transformer(config.model, 1).to(process.device)
        optimizer = ScheduledOptimizer(
            model.named_parameters(), model.hidden_matrices(), config.optim, config.train.max_steps
        )
        optimizer.load_state_dict(optimizer.zero_state())
        with AsyncSaver(config, run, model, optimizer, load_tokenizer("r50k_base"), process) as saver:
            for step in range(1, rounds + 1):
                start = time.perf_counter()
                saver.save(TrainState(step, 0, DataPosition(0, 0, 0, "")))
                waited = time.perf_counter() - start
                saver.wait()
                whole = time.perf_counter() - start
                print(f"{process.device.type}: training waits {waited:.2f} s of the {whole:.2f} s that a save takes")
        n_bytes = sum(path.stat().st_size for path in run.checkpoints.glob("step_*1/*/*"))
        start = time.perf_counter()
        found = load_latest(run.checkpoints, print)
        verified = time.perf_counter() - start
        print(f"{format_bytes(n_bytes)}; verified in {verified:.2f} s, step {found.state.step}")
        whole_file = Path(folder) / "plain.pt"
        start = time.perf_counter()
        torch.save([found.model, found.optimizer], whole_file)
        print(f"read and written again by torch.save, unflushed: {time.perf_counter() - start:.2f} s")
        shutil.rmtree(run.checkpoints)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="?", default="small-50m")
    parser.add_argument("--rounds", type=int, default=3)
    main(**vars(parser.parse_args()))
