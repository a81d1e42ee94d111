"""A run to publish: the files that training leaves, with made-up numbers."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from myllm.checkpoint.format import Snapshot, write_checkpoint
from myllm.checkpoint.state import TrainState
from myllm.config import HubConfig, RunConfig, to_dict
from myllm.data.sampler import DataPosition
from myllm.paths import RunPaths

TOKEN = "hf_averysecrettoken"
REPO = "someone/tiny"
STEPS = (4, 8, 12)


def save_checkpoint(run: RunPaths, config: RunConfig, step: int, scale: float = 1.0, numbers: int = 50_000) -> Path:
    """A checkpoint with `numbers` weights that depend on `step` and `scale`."""
    state = TrainState(step, step * config.train.batch_tokens, DataPosition(0, 0, 1, "0" * 64))
    weights = {"weight": torch.arange(numbers, dtype=torch.float32) * scale + step}
    return write_checkpoint(run.checkpoints, Snapshot(state, to_dict(config), weights, {}, {}))


def write_run(config: RunConfig, steps: tuple[int, ...] = STEPS, source: str | None = "files-texts") -> RunPaths:
    run = RunPaths.of(config.name)
    for step in steps:
        save_checkpoint(run, config, step)
    rows = []
    for step in range(1, max(steps) + 1):
        row = {"kind": "train", "step": step, "tokens": 128 * step, "loss": 10 / step, "lr": 1e-3, "grad_norm": 1.0}
        rows.append(row | {"step_s": 0.5, "tokens_per_s": 256.0, "mfu": None, "data_wait_s": 0.0})
        if step in steps:
            row = {"kind": "eval", "name": "cloze", "step": step, "acc": 0.4, "acc_norm": 0.36, "acc_stderr": 0.049}
            rows.append(row | {"n_examples": 100, "seconds": 2.0})
            row = {"kind": "eval", "name": "validation", "step": step, "loss": 20 / step, "n_tokens": 4_096}
            rows.append(row | {"seconds": 1.0})
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [{"step": step, "prompt": "the river", "text": f" at step {step}", "seed": 7} for step in steps]
    run.samples.write_text("".join(json.dumps(row) + "\n" for row in samples))
    run.config.write_text(json.dumps(to_dict(config)))
    run.environment.write_text(
        json.dumps(
            {
                "started": "2026-01-02T03:04:05+0000", "python": "3.11.7", "device": "cuda", "device_name": "Some GPU",
                "command": ["python", "/home/me/code/pretrain.py", "debug", "--data.source", "files:/home/me/texts"],
                "world_size": 8, "versions": {"torch": "2.13.0", "numpy": None}, "git_commit": "c" * 40,
                "git_dirty": True, "parameters": 1_234_567, "dataset": "files-texts-abc", "dataset_hash": "d" * 64,
                "source": source, "train_tokens": 1_000, "val_tokens": 3_000,
            }
        )
    )  # fmt: skip
    return run


def hub_config(config: RunConfig, **settings: object) -> RunConfig:
    return replace(config, hub=HubConfig(REPO, **settings))
