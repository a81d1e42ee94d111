"""Kills a save before each thing it does to the disk, one after another, and says what is left each time.

kill_inside_saves.py FOLDER    prints a JSON object a kill: what was about to be done, and what the folder holds then
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from myllm.checkpoint.format import Snapshot, load_checkpoint, write_checkpoint
from myllm.checkpoint.integrity import verify_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.checkpoint.retention import RetentionPolicy, clean_up_partial
from myllm.checkpoint.rng import get_rng_state
from myllm.checkpoint.state import TrainState
from myllm.data.sampler import DataPosition

CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


def put(checkpoints: Path, step: int, value: float) -> None:
    weights, moments = {"w": torch.full((50,), value)}, {"w.exp_avg": torch.full((50,), value)}
    state = TrainState(step, 0, DataPosition(0, 0, 0, ""))
    snapshot = Snapshot(state, {}, weights, moments, {0: get_rng_state(torch.device("cpu"))})
    write_checkpoint(checkpoints, snapshot, RetentionPolicy(last=2))


def dies_before(number: int) -> None:
    """Let this process end, as by SIGKILL, before its call number `number` of those that change the disk."""
    count = 0

    def wrapped(real: Callable[..., object], name: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                print(json.dumps({"before": name, "of": str(args[0])}), flush=True)
                os._exit(9)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name), name))


def left(checkpoints: Path) -> dict[str, object]:
    """By step, the value that each intact checkpoint holds; those that are not intact; all other names."""
    found = list_checkpoints(checkpoints)
    faults = {folder.name: list(verify_checkpoint(folder)) for folder in found}
    values = {folder.name: float(load_checkpoint(folder).model["w"][0]) for folder in found if not faults[folder.name]}
    others = [path.name for path in checkpoints.iterdir() if path not in found]
    return {"values": values, "faults": {name: said for name, said in faults.items() if said}, "others": others}


def main(root: Path) -> None:
    for again in (False, True):
        begun = root / f"begun-{again}"
        for step in (1, 2, 3) if again else (1, 2):
            put(begun, step, step)
        number, ended = 0, 9
        while ended == 9:
            number += 1
            work = root / "work"
            shutil.copytree(begun, work)
            child = os.fork()
            if child == 0:
                dies_before(number)
                put(work, 3, 3.5)
                os._exit(0)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            killed = left(work)
            clean_up_partial(work)
            print(json.dumps({"again": again, "ended": ended, "killed": killed, "then": left(work)}), flush=True)
            shutil.rmtree(work)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
