"""The published curve: what of it is data, which runs are compared with it, and when a run is warned."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import eval_rows, with_train
from support.run_files import eval_row, train_row, validation_row, write_run
from training.test_loop import run, run_until

from myllm.config import RunConfig, to_dict
from myllm.presets import PRESETS, get_preset
from myllm.runs import reference_curve as reference
from myllm.runs.history import read_metrics
from myllm.runs.reference_curve import Curve, Reference, ReferenceWatch, find_reference
from myllm.runs.report.axes import INK
from myllm.runs.report.html import write_report
from myllm.runs.report.plots import figure
from myllm.training import services

FALLING = Curve("loss", True, 0.05, (1_000, 10_000, 100_000), (4.0, 3.0, 2.5))
RISING = Curve("acc_norm", False, 0.02, (100_000,), (0.35,))
MADE_UP = Reference("made-up", {"validation": FALLING, "hellaswag": RISING}, batch_tokens=100)


def published() -> dict:
    return json.loads(Path(reference.__file__).with_name("reference.json").read_text())


# -- the data ---------------------------------------------------------------------------------------------------------


def test_published_points() -> None:
    """As its author gave them, and nothing in between."""
    data = published()
    points = {name: [(p["step"], p["value"]) for p in curve["points"]] for name, curve in data["curves"].items()}
    assert points == {
        "validation": [(1_300, 3.4548), (4_300, 3.1340), (9_300, 2.9771), (13_300, 2.8826), (19_072, 2.8063)],
        "hellaswag": [(19_072, 0.3555)],
    }
    for curve in data["curves"].values():
        assert all(p["tokens"] == p["step"] * 524_288 for p in curve["points"])
    assert "LF-Luis/LF_LLM-269M" in data["source"]


def test_bands_match_derivation() -> None:
    ours = find_reference(to_dict(get_preset("lf-llm-269m")))
    curve, hellaswag = ours.curves["validation"], ours.curves["hellaswag"]
    for left_out in range(1, len(curve.tokens) - 1):
        rest = [i for i in range(len(curve.tokens)) if i != left_out]
        line = np.interp(math.log(curve.tokens[left_out]), np.log(curve.tokens)[rest], np.array(curve.values)[rest])
        assert 0.005 < abs(line - curve.values[left_out]) < 0.035 < curve.band
    slope = (curve.values[-2] - curve.values[-1]) / math.log(curve.tokens[-1] / curve.tokens[-2])
    assert math.exp(curve.band / slope) == pytest.approx(1.25, abs=0.03)  # this many times the tokens
    error = math.sqrt(0.3555 * (1 - 0.3555) / 10_041)
    assert hellaswag.band == pytest.approx(2 * math.sqrt(2) * error, abs=1e-4)
    assert hellaswag.band_of({"acc_norm": 0.35, "acc_norm_stderr": error}) == pytest.approx(hellaswag.band, abs=1e-4)
    assert hellaswag.band_of({"acc_norm": 0.35, "acc_norm_stderr": 0.05}) == pytest.approx(0.1, rel=0.01)


def test_interpolation_is_linear_in_log_tokens() -> None:
    for tokens in (1_000, 2_500, 9_999, 10_000, 40_000, 100_000):
        line = np.interp(math.log(tokens), np.log(FALLING.tokens), FALLING.values)
        assert FALLING.at(tokens) == pytest.approx(line, abs=1e-12)
    assert FALLING.at(math.sqrt(1_000 * 10_000)) == pytest.approx(3.5)  # half way in the logarithm
    assert (FALLING.at(995), FALLING.at(100_500)) == (4.0, 2.5)  # a step or two beside
    assert FALLING.at(900) is FALLING.at(102_000) is FALLING.at(0) is None
    assert (RISING.at(99_500), RISING.at(50_000)) == (0.35, None)


# -- which runs -------------------------------------------------------------------------------------------------------


def changed(part: str, **values: object) -> RunConfig:
    config = get_preset("lf-llm-269m")
    return replace(config, **{part: replace(getattr(config, part), **values)})


@pytest.mark.parametrize(
    "config",
    [
        replace(get_preset("lf-llm-269m"), name="mine"),
        changed("optim", max_lr=1e-3, schedule="linear"),
        changed("model", dropout_ffn=0.0, vocab_multiple=1),
        changed("model", residual_dtype="bfloat16"),
        changed("train", batch_tokens=262_144, max_steps=38_146),
        changed("data", dataset="fineweb-edu-10bt-0123456789ab"),
        changed("data", dataset="/big/disk/fineweb-edu-10bt-0123456789ab/"),
    ],
)
def test_comparable_runs(config: RunConfig) -> None:
    assert find_reference(to_dict(config)).batch_tokens == config.train.batch_tokens


@pytest.mark.parametrize(
    "config",
    [
        *(get_preset(name) for name in PRESETS if name != "lf-llm-269m"),
        changed("model", max_seq_len=1_024),
        changed("model", vocab_size=32_000),
        changed("model", n_layers=15),
        changed("data", source="fineweb-10bt"),
        changed("data", dataset="files-texts"),
        changed("data", tokenizer="mine.json"),
        changed("train", max_steps=2_000),  # its rate has decayed by then
    ],
)
def test_incomparable_runs(config: RunConfig) -> None:
    assert find_reference(to_dict(config)) is None


@pytest.mark.parametrize("config", [{}, {"model": "x", "data": 3, "train": None}, {"train": {"max_steps": "many"}}])
def test_invalid_configs_have_no_reference(config: dict) -> None:
    assert find_reference(config) is None


# -- the watch --------------------------------------------------------------------------------------------------------


def lines(gaps: list[float], watch: ReferenceWatch, first: int = 0) -> list[str | None]:
    """What is said of validations so far above the curve, one each 10 steps from step 10."""
    messages = []
    for number, gap in enumerate(gaps, start=first + 1):
        step = 10 * number
        added, line = watch.compare("validation", step, {"loss": FALLING.at(step * 100) + gap})
        assert added["reference"] == FALLING.at(step * 100)
        assert added["reference_band"] == 0.05
        assert added["reference_status"] == ("worse" if gap > 0.05 else "better" if gap < -0.05 else "inside")
        messages.append(line and ("WARNING" if "WARNING" in line else line.rpartition(": ")[2]))
    return messages


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([0.0, 0.04, -0.04], [None, None, None]),
        ([0.1, 0.1, 0.12], ["WARNING", None, None]),  # once
        ([0.1, 0.14, 0.16, 0.2, 0.22], ["WARNING", None, "WARNING", None, "WARNING"]),  # worse by another band each
        ([0.1, 0.01, 0.02, 0.1], ["WARNING", "inside the band again", None, "WARNING"]),
        ([-0.1, -0.3, -0.2], ["better by 0.1000", None, None]),
        ([-0.1, 0.1], ["better by 0.1000", "WARNING"]),
    ],
)
def test_watch_messages(gaps: list[float], expected: list[str | None]) -> None:
    assert lines(gaps, ReferenceWatch(MADE_UP)) == expected
    for cut in range(len(gaps) + 1):  # and a restart anywhere in between says nothing twice
        rows = [
            {"kind": "eval", "name": "validation", "step": 10 * n, "loss": FALLING.at(1_000 * n) + gap}
            for n, gap in enumerate(gaps[:cut], start=1)
        ]
        assert lines(gaps[cut:], ReferenceWatch(MADE_UP, rows), cut) == expected[cut:]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (2.9, "WARNING, worse by 0.4000 (compared at"),
        (2.52, "inside the band (compared"),
        (2.4, "better by 0.1000 (com"),
    ],
)
def test_different_schedule_compared_only_at_end(end: float, message: str) -> None:
    """By hand: linear to zero is far above the curve of FALLING (4.0, 3.0, 2.5) until its last tenth."""
    differences = ("optim.max_lr 0.004 (reference: 0.0021)", "optim.schedule linear (reference: cosine)")
    watch = ReferenceWatch(replace(MADE_UP, differences=differences))
    for step, loss in ((10, 4.6), (100, 3.3), (500, 2.9), (900, 2.7)):
        assert watch.compare("validation", step, {"loss": loss}) == ({}, None)
    added, line = watch.compare("validation", 1_000, {"loss": end})
    assert added["reference"] == 2.5
    assert line.rpartition("band ±0.0500: ")[2].startswith(message)


@pytest.mark.parametrize(
    ("changes", "end_only"),
    [
        ({}, False),
        ({"max_lr": 0.01, "warmup_steps": 3, "beta2": 0.98}, False),
        ({"decay_fraction": 0.2, "decay_shape": "sqrt"}, False),  # of wsd, which this run does not use
        ({"schedule": "linear"}, True),
        ({"schedule": "wsd"}, True),
        ({"min_lr_ratio": 0.0}, True),
    ],
)
def test_schedule_settings_set_compares_end_only(changes: dict[str, object], end_only: bool) -> None:
    assert find_reference(to_dict(changed("optim", **changes))).compares_end_only == end_only


def test_warning_includes_figures_and_differing_settings() -> None:
    config = to_dict(changed("optim", max_lr=0.01))
    watch = ReferenceWatch(find_reference(config))
    _, line = watch.compare("validation", 4_300, {"loss": 3.3})
    assert line.startswith(
        "validation loss 3.3000 at step 4,300 (2.25B tokens); the reference run LF_LLM-269M had 3.1340 there, band "
        "±0.0500: WARNING, worse by 0.1660. Check the settings that differ from the reference (optim.max_lr "
        "0.01 (reference: 0.0021))"
    )
    _, line = watch.compare("hellaswag", 19_073, {"acc_norm": 0.30, "acc_norm_stderr": 0.0046})
    assert "HellaSwag accuracy 0.3000" in line
    assert "WARNING, worse by 0.0555" in line
    _, line = ReferenceWatch(MADE_UP).compare("validation", 100, {"loss": math.nan})
    assert "WARNING, worse by inf" in line


def test_no_comparison_without_reference_point() -> None:
    assert ReferenceWatch(None).compare("validation", 10, {"loss": 9.0}) == ({}, None)
    watch = ReferenceWatch(MADE_UP)
    assert watch.compare("validation", 5, {"loss": 9.0}) == ({}, None)  # before the first point
    assert watch.compare("hellaswag", 100, {"acc_norm": 0.0}) == ({}, None)
    assert watch.compare("cloze", 100, {"acc": 0.0}) == ({}, None)
    assert watch.compare("samples", 100, {}) == ({}, None)


def test_warning_logged_once_across_restart(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = Curve("loss", True, 0.05, (200, 2_000), (2.0, 2.0))  # which this run will not reach
    custom_reference = Reference("made-up", {"validation": curve}, batch_tokens=128)
    monkeypatch.setattr(services, "find_reference", lambda _: custom_reference)
    config = replace(with_train(tiny, max_steps=8), eval=replace(tiny.eval, validation_every_steps=2))
    config = replace(config, optim=replace(tiny.optim, max_lr=1e-6))
    run_until(config, 7, monkeypatch)
    root = run(config)
    rows = eval_rows(root, "validation")
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    assert "reference" not in rows[0]
    for row in rows[1:]:
        assert (row["reference"], row["reference_band"], row["reference_status"]) == (2.0, 0.05, "worse")
    log = (root / "log.txt").read_text()
    assert "resuming from" in log
    (warned,) = [line for line in log.splitlines() if "WARNING" in line]
    assert "at step 2 (2.56e-07B tokens)" in warned


# -- the figures ------------------------------------------------------------------------------------------------------


def rows_until(last: int) -> list[dict]:
    rows = [train_row(step, tokens=step * 524_288) for step in range(100, last + 1, 100)]
    rows += [validation_row(step, 3.0) for step in range(0, last + 1, 250)]
    return [*rows, eval_row("hellaswag", last, acc=0.3, acc_norm=0.33)]


def axes_of(name: str, folder: Path, last: int, config: dict) -> tuple[list, list[str]]:
    axes = figure(name, read_metrics(write_run(folder, rows_until(last)).metrics), config).axes[0]
    dashed = [line for line in axes.lines if line.is_dashed() and line.get_color() == INK]
    return dashed, [text.get_text() for text in axes.texts]


def test_figures_plot_reference_by_tokens(tmp_path: Path) -> None:
    """Half the batch: the published points stand at twice the steps."""
    config = to_dict(changed("train", batch_tokens=262_144, max_steps=38_146))
    (line,), texts = axes_of("loss", tmp_path / "a", 10_000, config)
    steps, values = line.get_data()
    assert (steps[0], values[0]) == (pytest.approx(2_600), pytest.approx(3.4548))
    assert steps[-1] == pytest.approx(10_000)  # no further than the run itself
    at = np.interp(8_600, steps, values)
    assert at == pytest.approx(3.1340, abs=1e-3)
    assert any(text.startswith("LF_LLM-269M\n") for text in texts)
    (line,), texts = axes_of("accuracy", tmp_path / "b", 10_000, config)
    assert set(line.get_ydata()) == {0.3555}
    assert "LF_LLM-269M\nat its end 35.55 %" in texts


def test_figures_omit_reference_curve(tmp_path: Path) -> None:
    assert axes_of("loss", tmp_path / "a", 10_000, to_dict(get_preset("default-150m")))[0] == []
    assert axes_of("loss", tmp_path / "b", 1_000, to_dict(get_preset("lf-llm-269m")))[0] == []
    assert axes_of("loss", tmp_path / "c", 10_000, {})[0] == []


def test_report_includes_reference_curve(tmp_path: Path) -> None:
    run_paths = write_run(tmp_path / "run", rows_until(19_000))
    run_paths.config.write_text(json.dumps(to_dict(get_preset("lf-llm-269m"))))
    assert write_report(run_paths).stat().st_size > 10_000
