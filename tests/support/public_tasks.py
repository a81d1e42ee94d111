"""The repositories of the public tasks on the loopback Hub."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from support.hub_server import HubServer

from myllm.evals.tasks import TASKS


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def publish_task(hub: HubServer, name: str, rows: list[dict[str, Any]]) -> bytes:
    """The rows of a task in its repository, beside other splits and another configuration. Returns their file."""
    repo, *config, split = TASKS[name].source.split(":")
    repo, _, revision = repo.partition("@")
    folder = config[0] if config else "data"
    paths = {each: f"{folder}/{each}-00000-of-00001.parquet" for each in ("train", "test", "validation")}
    lines = [f"- config_name: {folder}", "  data_files:"]
    for each, path in paths.items():
        lines += [f"  - split: {each}", f"    path: {path}"]
    other = ["- config_name: other", "  data_files: other/*"]
    card = "\n".join(["---", "configs:", *other, *lines, *([] if config else ["  default: true"]), "---", ""])
    files = dict.fromkeys([*paths.values(), "other/0.parquet"], parquet(rows[:1] * 7)) | {paths[split]: parquet(rows)}
    hub.add_dataset(repo, files | {"README.md": card.encode()}, sha=revision or None)
    return files[paths[split]]
