"""The page that compares runs, its numbers and what a browser makes of it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.image import imread
from support.browser import Browser, chromium
from support.run_files import eval_row, full_rows, train_row, validation_row, write_run

from myllm.cli.main import main
from myllm.config import ModelConfig, OptimConfig, RunConfig, to_dict
from myllm.errors import UserError
from myllm.formatting import format_percent
from myllm.paths import RunPaths
from myllm.runs import eval_results
from myllm.runs.compare import tables
from myllm.runs.compare.curves import chart_data, read_run
from myllm.runs.compare.page import comparison_path, write_comparison
from myllm.runs.eval_results import Result

# By hand: embedding 100 x 8; attention 2 x (8 x 24 + 8 x 8); SwiGLU 2 x (8 x 64 + 32 x 8); norms 2 x 2 x 8 + 8.
MODEL = ModelConfig(vocab_size=100, max_seq_len=16, d_model=8, n_layers=2, n_heads=2, d_ff=32)
FLOPS_PER_TOKEN = 6 * (800 + 512 + 1_536 + 40) + 12 * 2 * 8 * 16
CONFIG = RunConfig(model=MODEL)


def write(
    folder: Path, name: str, config: RunConfig = CONFIG, rows: list[dict[str, Any]] = (), **facts: Any
) -> RunPaths:
    samples = [
        {"step": step, "prompt": "Hello <b>you</b>", "text": f" {name} at {step} <script>alert(1)</script>", "seed": 1}
        for step in (0, 200)
    ]
    run = write_run(folder / "runs" / name, rows or full_rows(), samples)
    run.config.write_text(json.dumps(to_dict(replace(config, name=name))))
    run.environment.write_text(
        json.dumps({"command": ["python", "pretrain.py", "debug"], "device_name": "CPU"} | facts)
    )
    return run


@pytest.fixture
def pair(temp_data: Path) -> list[RunPaths]:
    """The second one trained half as long, with another rate, and was restarted twice."""
    rows = [row | {"tokens": row["tokens"] * 2} for row in map(train_row, range(5, 101, 5))]
    start = {"kind": "overhead", "seconds": {"starting": 2.0}}
    rows = [start | {"step": 5}, *rows[:8], start | {"step": 45}, *rows[8:14], start | {"step": 75}, *rows[14:]]
    rows += [validation_row(100, 3.5), eval_row("hellaswag", 50, acc=0.27, acc_norm=0.28, n_examples=100)]
    faster = replace(CONFIG, optim=OptimConfig(max_lr=2e-3))
    return [write(temp_data, "first"), write(temp_data, "second & <i>last", faster, rows, device_name="GPU")]


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_chart_positions_on_all_axes(pair: list[RunPaths]) -> None:
    data = chart_data([read_run(run) for run in pair])
    loss = next(chart for chart in data["charts"] if chart["title"].startswith("Training loss"))
    first, second = loss["curves"]
    assert first["step"] == list(range(5, 201, 5))
    assert first["tokens"] == [1_000 * step for step in first["step"]]
    np.testing.assert_allclose(first["hours"], [step * 0.5 / 3_600 for step in first["step"]], rtol=1e-5)
    np.testing.assert_allclose(first["flops"], [step * 1_000 * FLOPS_PER_TOKEN for step in first["step"]], rtol=1e-5)
    np.testing.assert_allclose(second["flops"], [step * 2_000 * FLOPS_PER_TOKEN for step in second["step"]], rtol=1e-5)
    hellaswag = next(chart for chart in data["charts"] if chart["title"].startswith("HellaSwag"))
    assert [curve["value"] for curve in hellaswag["curves"]] == [[0.27, 0.27], [0.28]]
    assert [run["restarts"]["step"] for run in data["runs"]] == [[], [45, 75]]
    assert [run["restarts"]["tokens"] for run in data["runs"]] == [[], [90_000, 150_000]]


def test_axes_omitted_for_unknown_model_or_speed(temp_data: Path) -> None:
    rows = [train_row(step, tokens_per_s=None) for step in (1, 2, 3)]
    run = write(temp_data, "bare", rows=rows)
    run.config.write_text('{"name": "bare"}')
    curve = chart_data([read_run(run)])["charts"][0]["curves"][0]
    assert curve.keys() == {"step", "tokens", "value"}
    headings = ["Run", "Preset", "Training loss", "Step", "Tokens", "Restarts", "Device"]
    assert [cell.text for cell in tables.summaries([read_run(run)]).headings] == headings


def test_differences(pair: list[RunPaths]) -> None:
    table = tables.differences([read_run(run) for run in pair])
    assert [cell.text for cell in table.headings] == ["Setting", "first", "second & <i>last"]
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert rows == {"optim.max_lr": ["0.0006", "0.002"], "device_name": ["CPU", "GPU"]}
    assert not tables.differences([read_run(pair[0])] * 2).rows


def test_missing_settings_compare_as_defaults(pair: list[RunPaths]) -> None:
    """A setting that it did not have is its default, not a difference."""
    config = json.loads(pair[1].config.read_text())
    del config["optim"]["beta2"], config["init"], config["model"]["embedding_norm"]
    pair[1].config.write_text(json.dumps(config))
    names = [row[0].text for row in tables.differences([read_run(run) for run in pair]).rows]
    assert names == ["optim.max_lr", "device_name"]


def by_heading(table: tables.Table) -> list[dict[str, tables.Cell]]:
    """For each row, the cells by the text of their headings: what is in small print too."""
    names = [f"{cell.text} ({cell.detail})" if cell.detail else cell.text for cell in table.headings]
    return [dict(zip(names, row, strict=True)) for row in table.rows]


def test_training_evaluations_and_warnings(pair: list[RunPaths]) -> None:
    runs = [read_run(run) for run in pair]
    first, second = by_heading(tables.evaluations(runs))
    assert first["Validation loss (in training)"] == ("3.2500", 3.25, "step 200")
    assert first["Cloze accuracy (in training)"] == (format_percent(0.31), 0.31, f"± {format_percent(0.02)}, step 200")
    assert second["HellaSwag accuracy (in training)"] == (format_percent(0.28), 0.28, "step 50")
    assert second["Cloze accuracy (in training)"] == ("", None, "")
    assert not any("myllm eval" in heading for heading in first)
    assert [line.partition(":")[0] for line in tables.warnings(runs)] == ["The runs have different lengths"]
    other = replace(runs[0], environment={"tokenizer": {"sha256": "x"}, "dataset_hash": "y"})
    assert len(tables.warnings([runs[0], other])) == 2


def evaluated(run: RunPaths, task: str, step: int | None, settings: dict[str, Any], **metrics: float) -> None:
    eval_results.add(run.evals, Result(task, f"{run.root}/x", step, "float32", settings, metrics, "cpu", 1.0))


def test_eval_command_results(pair: list[RunPaths], capsys: pytest.CaptureFixture[str]) -> None:
    """A column is one question, whose newest answer counts."""
    lm_eval = {"protocol": "lm-eval", "examples": "all", "data_sha256": "1a2b3c"}
    for step, accuracy in ((200, 0.31), (100, 0.29)):  # the later one of an earlier checkpoint
        evaluated(pair[0], "piqa", step, lm_eval, acc=0.5, acc_norm=accuracy, acc_stderr=0.5, acc_norm_stderr=0.011)
    evaluated(pair[1], "piqa", 100, lm_eval, acc=0.5, acc_norm=0.35, acc_norm_stderr=0.012)
    evaluated(pair[1], "piqa", 100, lm_eval | {"data_sha256": "other"}, acc=0.5, acc_norm=0.99)
    evaluated(pair[1], "perplexity:/a/book.txt", None, {"context": 16}, loss=4.5, perplexity=math.exp(4.5))
    first, second = by_heading(tables.evaluations([read_run(run) for run in pair]))
    assert "PIQA accuracy (myllm eval: protocol lm-eval, examples all, float32)" in first
    table = tables.evaluations([read_run(run) for run in pair])
    columns = [index for index, cell in enumerate(table.headings) if cell.text == "PIQA accuracy"]
    assert [[row[index].text for index in columns] for row in table.rows] == [
        [format_percent(0.31), ""],
        [format_percent(0.35), format_percent(0.99)],
    ]
    assert table.rows[0][columns[0]].detail == f"± {format_percent(0.011)}, step 200"
    assert second["Text book.txt loss (myllm eval: context 16, float32)"] == ("4.5000", 4.5, "")
    pair[0].evals.write_text("{}")
    assert read_run(pair[0]).results == []
    assert "its results are left out" in capsys.readouterr().err


def test_comparison_page_path(pair: list[RunPaths], capsys: pytest.CaptureFixture[str]) -> None:
    names = [run.root.name for run in pair]
    main(["report", *names])
    path = Path(capsys.readouterr().out.strip())
    assert path == comparison_path(names) == write_comparison(pair)
    assert len(comparison_path(["n" * 200] * 16).name) <= 150
    with pytest.raises(UserError, match="expected at most 16"):
        write_comparison(pair * 9)
    with pytest.raises(SystemExit):
        main(["report", "first", "secnd"])
    assert "there is no run folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report"])


def test_compare_earlier_versions(tmp_path: Path) -> None:
    runs = [RunPaths(ROOT / "tests/earlier" / version / "runs/done") for version in ("b1d1391", "b351187")]
    assert chart_data([read_run(run) for run in runs])["charts"][0]["curves"][1]["value"][-1] == pytest.approx(5.59409)


# -- in a browser -----------------------------------------------------------------------------------------------------

READY = "document.querySelectorAll('.chart svg').length > 3"
PATHS = "[...document.querySelector('.chart').querySelectorAll('path[fill=none]')].map(e => e.getAttribute('d'))"


def click(browser: Browser, text: str) -> None:
    browser.run(f"[...document.querySelectorAll('button')].find(e => e.textContent.includes({text!r})).click()")


def test_axes_legend_and_restarts(pair: list[RunPaths], tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as browser:
        browser.open(write_comparison(pair).as_uri(), ready=READY)
        by_step = browser.run(PATHS)
        assert len(by_step) == 2
        assert browser.run("document.querySelectorAll('.chart:first-child .restart').length") == 2
        labels = set()
        for axis in ("Tokens", "Time", "FLOPs"):
            click(browser, axis)
            labels.add(browser.run("[...document.querySelectorAll('.chart:first-child svg text')].at(-1).textContent"))
            assert len(browser.run(PATHS)) == 2
        assert labels == {"tokens", "hours of training", "FLOPs of training"}
        click(browser, "Step")
        assert browser.run(PATHS) == by_step
        click(browser, "Last half")
        assert browser.run(PATHS) != by_step
        click(browser, "All")
        click(browser, "second & <i>last")
        assert browser.run(PATHS)[0] != by_step[1]
        assert len(browser.run(PATHS)) == 1
        assert browser.errors == []


def test_tooltips_and_sortable_tables(pair: list[RunPaths], tmp_path: Path) -> None:
    for run, loss in zip(pair, (4.5, 4.25), strict=True):
        evaluated(run, "perplexity:book.txt", 100, {"context": 16}, loss=loss)
    with chromium(tmp_path / "profile") as browser:
        browser.open(write_comparison(pair).as_uri(), ready=READY)
        browser.point("document.querySelector('.chart svg')")
        tip = browser.run("document.querySelector('.tip').textContent")
        assert "first4.0000" in tip  # step 100 of 200, where the second run ended
        assert "second & <i>last3.5000" in tip
        first = "document.querySelector('.sortable tbody tr').cells[0].textContent"
        orders = []
        for _ in range(2):
            click(browser, "Lowest")
            orders.append(browser.run(first))
        assert orders == ["first", "second & <i>last"]
        assert browser.run("document.querySelector('[aria-sort]').textContent") == "Lowest"
        click(browser, "Text book.txt loss")
        table = "document.querySelectorAll('.sortable')[1]"
        assert browser.run(f"{table}.tBodies[0].rows[0].cells[0].textContent") == "second & <i>last"
        assert "4.2500step 100" in browser.run(f"{table}.tBodies[0].textContent")
        assert browser.run("document.querySelector('.sample .text').textContent").startswith("first at 200 <script>")
        assert browser.errors == []


@pytest.mark.parametrize("width", [390, 1200])
def test_page_width_and_color_scheme(width: int, pair: list[RunPaths], tmp_path: Path) -> None:
    address = write_comparison(pair).as_uri()
    with chromium(tmp_path / "profile") as browser:
        for dark in (False, True):
            browser.open(address, width=width, dark=dark, ready=READY)
            assert browser.run("document.documentElement.scrollWidth") <= width
            table = "document.querySelector('.differences')"
            assert browser.run(f"{table}.scrollWidth - {table}.parentElement.clientWidth") <= 0, (
                "two runs need no scrolling"
            )
            sizes = "[...document.querySelectorAll('.chart text')].map(e => e.getBoundingClientRect().height)"
            assert min(browser.run(sizes)) >= 11
            browser.run("document.querySelector('.chart').scrollIntoView()")
            browser.screenshot(tmp_path / "page.png")
            pixels = imread(tmp_path / "page.png")[60:300, 40 : width - 60, :3]
            assert (np.median(pixels) < 0.4) == dark
            curve = browser.run("getComputedStyle(document.querySelector('path[fill=none]')).stroke")
            assert curve == ("rgb(86, 180, 233)" if dark else "rgb(0, 114, 178)")
