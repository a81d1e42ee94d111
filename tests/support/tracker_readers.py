"""What experiment trackers show of a run, read as their own programs read it: {tag: [(step, value), ...]}."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

Curves = dict[str, list[tuple[int, float]]]


def read_tensorboard(root: Path, temp_data: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_wandb(root: Path, temp_data: Path) -> Curves:
    """All offline folders, in their order, as `wandb sync` uploads them; they must be of one run."""
    from wandb.proto.wandb_internal_pb2 import Record

    curves: Curves = {}
    files = sorted((root / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1, "another id is another curve"
    for file in files:
        for data in leveldb_records(file.read_bytes()[7:]):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for tag, value in items.items():
                    if not tag.startswith("_"):
                        curves.setdefault(tag, []).append((items["_step"], float(value)))
    return curves


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log, whose file header of 7 bytes counts for the first block of 32 KiB."""
    at, begun = 0, b""
    while at + 7 <= len(data):
        left = -(at + 7) % 32_768 or 32_768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        begun += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield begun
            begun = b""


def read_trackio(root: Path, temp_data: Path) -> Curves:
    curves: Curves = {}
    with sqlite3.connect(temp_data / "trackio" / "myllm.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, *_ in rows}) == 1
    for _, step, metrics in rows:
        for tag, value in json.loads(metrics).items():
            curves.setdefault(tag, []).append((step, float(value)))
    return curves


def read_mlflow(root: Path, temp_data: Path) -> Curves:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{temp_data}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("myllm").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.d_model"] == "16"
    return {
        tag: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, tag)] for tag in run.data.metrics
    }


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio, "mlflow": read_mlflow}
