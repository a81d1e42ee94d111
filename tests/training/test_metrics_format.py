"""docs/metrics_format.md lists the keys of a run's rows: all of them, and no others."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_corpora
from runs.test_reference_curve import MADE_UP
from training.test_loop import run

from myllm.config import RunConfig
from myllm.evals.tasks import TASKS
from myllm.training import services

PAGE = (ROOT / "docs" / "metrics_format.md").read_text(encoding="utf-8")
HELLASWAG = ROOT / "tests" / "evals" / "hellaswag_own.jsonl"


def documented(section: str) -> dict[str, str]:
    """When a row has each key."""
    text = re.search(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert text
    return dict(re.findall(r"^\| `([^`]+)` \|.*\| ([^|]+) \|$", text[1], re.M))


def always(section: str) -> set[str]:
    return {key for key, when in documented(section).items() if when == "always"}


def rows_by_kind(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of both files, by the page's sections."""
    rows = defaultdict(list)
    for line in (root / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["kind"]].append(row)
    rows["samples.jsonl"] = [json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()]
    return rows


def keys(rows: Iterable[dict[str, Any]], components: tuple[str, ...] = ()) -> set[str]:
    """All keys of rows, with the page's word for components."""
    pattern = re.compile("/(" + "|".join(components) + ")$") if components else re.compile("$^")
    return {pattern.sub("/COMPONENT", key) for row in rows for key in row}


def test_plain_run_has_only_keys_marked_always(tiny: RunConfig, prepared_data: None) -> None:
    rows = rows_by_kind(run(tiny))
    for section in ("train", "overhead", "samples.jsonl"):
        for row in rows[section]:
            assert keys([row]) == always(section)
    assert {row["name"] for row in rows["eval"]} == {"validation", "cloze"}
    for row in rows["eval"]:
        assert always("eval") < keys([row]) < documented("eval").keys()


def test_page_lists_every_key_and_none_other(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run with everything that adds keys: a mixture, Muon, skipping, float16, tasks and a published run."""
    a, b = write_corpora(tmp_path / "corpora", a=50, b=40)
    lambada = tmp_path / "lambada.jsonl"
    lambada.write_text(f"{json.dumps(TASKS['lambada'].sample)}\n" * 3)
    monkeypatch.setattr(services, "find_reference", lambda _: replace(MADE_UP, batch_tokens=50_000))
    root = run(
        replace(
            tiny,
            data=replace(tiny.data, source=f"{a}:0.5 {b}:0.5", val_tokens=4_000),
            optim=replace(tiny.optim, optimizer="muon"),
            train=replace(tiny.train, max_steps=2, precision="float16", on_nonfinite="skip"),
            eval=replace(
                tiny.eval, hellaswag_every_steps=2, hellaswag_file=str(HELLASWAG), hellaswag_examples=4,
                tasks=(f"lambada:{lambada}",), tasks_every_steps=2,
            ),
        )
    )  # fmt: skip
    rows = rows_by_kind(root)
    assert {row["name"] for row in rows["eval"]} == {
        "validation", "validation/files-a", "validation/files-b", "cloze", "hellaswag", "lambada",
    }  # fmt: skip
    for section in ("train", "eval", "overhead", "samples.jsonl"):
        assert keys(rows[section], ("files-a", "files-b")) == documented(section).keys()
        for row in rows[section]:
            assert always(section) <= row.keys()
    whole = [row for row in rows["eval"] if not row["name"].startswith("validation/")]
    assert all("seconds" in row for row in whole)
