"""The figures and the HTML page of a run, from its metrics.jsonl."""

import base64
import io
import json
import math
import os
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.image import imread
from support.browser import chromium
from support.run_files import eval_row, full_rows, train_row, validation_row, write_run

from myllm.errors import UserError
from myllm.formatting import format_percent
from myllm.paths import RunPaths
from myllm.runs.eval_results import Result, add
from myllm.runs.history import read_metrics
from myllm.runs.report import plots
from myllm.runs.report.axes import MAX_POINTS, downsample
from myllm.runs.report.html import write_report

VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """The tags and texts of a page. Fails on unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def cards(self) -> dict[str, str]:
        """Headline values by title."""
        texts = [(tag, text.replace("\N{NO-BREAK SPACE}", " ")) for tag, text in self.texts if tag in ("dt", "dd")]
        return {title: texts[index + 1][1] for index, (tag, title) in enumerate(texts) if tag == "dt"}

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def small_run(folder: Path) -> RunPaths:
    samples = [
        {"step": 0, "prompt": "Hello <b>you</b>", "text": " <script>alert('x')</script> & noise", "seed": 1},
        {"step": 100, "prompt": "Hello <b>you</b>", "text": " in the middle", "seed": 1},
        {"step": 200, "prompt": "Hello <b>you</b>", "text": " at the end", "seed": 1},
    ]
    return write_run(folder / "runs/small", full_rows(), samples)


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A run without a report."""
    return small_run(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """The same run with its report, shared by tests that only read it."""
    run = small_run(tmp_path_factory.mktemp("reported"))
    assert write_report(run) == run.report
    return run


@pytest.fixture
def page(reported: RunPaths) -> Page:
    return Page(reported.report.read_text(encoding="utf-8"))


def page_of(run: RunPaths) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


# -- robustness -------------------------------------------------------------------------------------------------------


def test_report_tolerates_malformed_rows_and_files(run: RunPaths) -> None:
    """Unusable lines and values are skipped, and lines without a step are counted."""
    odd = ["{}", "null", "[[[[", '{"step": 5}', '{"kind": "train", "step": "5"}', "[" * 100_000]
    huge = "9" * 400
    odd_rows = [
        f'{{"kind": "train", "step": 205, "loss": {huge}, "tokens": "many", "lr": [], "tokens_per_s": {{}}}}',
        '{"kind": "eval", "name": ["x"], "step": 205, "loss": null, "seconds": "long"}',
        f'{{"kind": "eval", "name": "cloze", "step": 205, "acc": "high", "acc_stderr": {huge}, "protocol": "x"}}',
        '{"kind": "apart", "step": 205, "seconds": {"saving": "long", "waiting": NaN}}',
    ]
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write("\n".join([*odd, *odd_rows]) + "\n")
    run.samples.write_text("\n".join([*odd, '{"step": 1, "prompt": 7, "text": null}', '{"step": 2, "prompt": "x"}']))
    run.config.write_text('{"train": 5, "model": null, "data": [], "eval": "x", "optim": {"max_grad_norm": "1"}}')
    run.environment.write_text(
        '{"world_size": "two", "command": [1, null], "source": 5, "device_name": {}, "parameters": {}}'
    )
    page_of(run)
    assert read_metrics(run.metrics).skipped == len(odd)
    for content in (b"null", b"[" * 100_000, b"\xff\xfe{"):
        for path in (run.config, run.environment):
            path.write_bytes(content)
        page_of(run)


def test_missing_run_lists_existing_runs(run: RunPaths) -> None:
    with pytest.raises(UserError, match=r"smol, did you mean 'small'\?; existing runs: small"):
        write_report(RunPaths(run.root.parent / "smol"))


def test_missing_metrics_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        write_report(RunPaths(tmp_path))


@pytest.mark.parametrize("content", ["", "\n", '{"kind": "train", "st'])
def test_metrics_without_rows_raise(run: RunPaths, content: str) -> None:
    run.metrics.write_text(content)
    with pytest.raises(UserError, match="no training or evaluation row yet"):
        write_report(run)


def test_import_does_not_load_torch() -> None:
    code = "import sys, myllm.runs.report.html; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=os.environ | environment)


@pytest.mark.parametrize(
    "backend", ["nonsense", "module://matplotlib_inline.backend_inline", "module://nowhere.at.all"]
)
def test_draws_under_any_matplotlib_backend(run: RunPaths, backend: str) -> None:
    code = f"from myllm.cli.main import main\nmain(['report', {str(run.root)!r}])"
    done = run_python(code, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert (run.plots / "loss.png").is_file()


def test_failed_report_prints_single_line(tmp_path: Path) -> None:
    code = "import pretrain\nfrom myllm.paths import Path, RunPaths\n"
    code += f"pretrain.draw_report(RunPaths(Path({str(tmp_path)!r})))"
    for before in ("", "sys.modules['matplotlib'] = None\n"):
        done = run_python(before + code)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("no report: ")
        assert len(done.stderr.splitlines()) == 1


# -- figures ----------------------------------------------------------------------------------------------------------


def test_downsampling_preserves_ends_and_spikes() -> None:
    values = np.zeros(100_000)
    values[[12_345, 77_777]] = [9.0, -9.0]
    steps, kept = downsample(np.arange(100_000), values)
    assert len(steps) <= MAX_POINTS + 2
    assert {0, 12_345, 77_777, 99_999} <= set(steps)
    assert (kept.max(), kept.min()) == (9.0, -9.0)


def test_draws_every_figure(run: RunPaths) -> None:
    write_report(run)
    drawn = {path.stem: imread(path) for path in run.plots.iterdir()}
    small = ["perplexity", "accuracy", "grad_norm", "learning_rate", "throughput"]
    assert sorted(drawn) == sorted(["loss", "loss_compact", *small])
    assert drawn["loss"].shape[:2] == (940, 2_080)
    for name in small:
        assert drawn[name].shape[:2] == (660, 940)
    for name, pixels in drawn.items():
        assert (pixels[[0, -1]][..., :3] == 1).all(), f"{name}: something runs over the upper or lower edge"
        assert (pixels[:, [0, -1]][..., :3] == 1).all(), f"{name}: something runs over the left or right edge"
        inked = (pixels[..., :3] < 0.9).any(axis=-1).mean()
        assert 0.01 < inked < 0.3, f"{name} is empty or full: {inked:.1%} of it is inked"


def test_draws_both_learning_rates(tmp_path: Path) -> None:
    rows = [train_row(step, lr=1e-3 * step, muon_lr=1e-2 * step) for step in (1, 2, 3)]
    (axes,) = plots.figure("learning_rate", read_metrics(write_run(tmp_path / "run", rows).metrics), {}).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1e-3, 2e-3, 3e-3], [0.01, 0.02, 0.03]]
    assert {text.get_text() for text in axes.texts} >= {"AdamW\n0.003", "Muon\n0.03"}
    assert axes.get_ylim()[1] > 0.03


def test_draws_component_losses(tmp_path: Path) -> None:
    """Of one that begins in a later stage, too."""
    rows = [train_row(1, **{"loss/a": 3.0}), train_row(2, **{"loss/a": 2.0, "loss/b": 5.0})]
    metrics = read_metrics(write_run(tmp_path / "run", rows).metrics)
    (axes,) = plots.figure("components", metrics, {}).axes
    assert {text.get_text() for text in axes.texts} >= {"a\n2", "b\n5"}
    assert plots.figure("components", metrics.up_to(0), {}) is None


def test_deletes_figures_without_data(run: RunPaths) -> None:
    write_report(run)
    rows = [{"kind": "train", "step": step, "loss": 2.0} for step in (1, 2)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(run)
    assert {path.name for path in run.plots.iterdir()} == {"loss.png", "loss_compact.png", "perplexity.png"}


@pytest.mark.parametrize(
    "rows",
    [
        [train_row(5)],
        [validation_row(0, 10.8)],
        [eval_row("cloze", 0, acc=0.25)],
        [train_row(5, loss=math.nan), train_row(10, loss=math.inf, grad_norm=math.nan), train_row(15)],
        [train_row(5, loss=math.nan, grad_norm=math.inf, lr=math.nan, tokens_per_s=math.nan)],
        [train_row(5, loss=0.0, grad_norm=0.0, lr=0.0, tokens_per_s=0.0, tokens=0, mfu=0.0)],
        [train_row(5, loss=1e4), train_row(10, loss=1e-4)],
        [train_row(step, mfu=0.4 if step > 5 else None) for step in (5, 10, 15)],
        [train_row(5), validation_row(10, math.nan)],
    ],
    ids=["one row", "one eval", "cloze only", "some NaN", "all NaN", "zeros", "huge", "mfu", "NaN eval"],
)
@pytest.mark.filterwarnings("error")
def test_report_tolerates_unusual_metrics(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    run = write_run(tmp_path / "odd", rows)
    page = page_of(run)
    assert len(page.images()) == len([path for path in run.plots.glob("*.png") if path.stem != "loss_compact"])


def test_shows_only_newest_cloze_protocol(tmp_path: Path) -> None:
    """Chance is 25 % only in protocol 2, which also has the score without the context."""
    older = [eval_row("cloze", step, acc=0.3, acc_norm=0.3, n_examples=100) for step in (0, 100)]
    newer = [eval_row("cloze", 200, acc=0.4, acc_norm=0.4, acc_blind=0.24, n_examples=100, protocol=2)]
    both, old = write_run(tmp_path / "both", older + newer), write_run(tmp_path / "old", older)
    assert [row["step"] for row in read_metrics(both.metrics).rows("cloze")] == [200]
    assert [row["step"] for row in read_metrics(old.metrics).rows("cloze")] == [0, 100]
    space = "\N{NO-BREAK SPACE}"
    page_of(both), page_of(old)
    html = both.report.read_text(encoding="utf-8")
    assert f"100 examples, chance 25{space}%, without the context 24.0{space}%" in html
    assert "chance" not in old.report.read_text(encoding="utf-8")


def test_report_requires_only_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bare", full_rows())
    for path in (run.config, run.environment, run.samples):
        path.unlink()
    assert page_of(run).cards()["Validation loss"] == "3.2500"


def test_long_run_report_stays_small_and_fast(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=200_000)
    rows = [train_row(step, loss=3.0 + 0.1 * noise[step - 1]) for step in range(1, 200_001)]
    rows += [validation_row(step, 3.0) for step in range(0, 200_001, 100)]
    run = write_run(tmp_path / "long", rows)
    started = time.process_time()
    assert write_report(run).stat().st_size < 2_000_000
    assert time.process_time() - started < 30, "drawing takes time that grows with the number of rows"


# -- the page ---------------------------------------------------------------------------------------------------------


def test_page_is_self_contained(reported: RunPaths, page: Page) -> None:
    html = reported.report.read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:"), f"<{tag}> refers to {attributes[name]}"
    assert "url(" not in html
    assert "@import" not in html
    assert [path.name for path in reported.root.glob("report*")] == ["report.html"]


def test_page_embeds_figures_with_alt_text(reported: RunPaths, page: Page) -> None:
    images = page.images()
    assert len(images) == 6
    for image in images:
        assert image["alt"]
        png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert imread(io.BytesIO(png)).shape[0] > 600
    assert (reported.plots / "loss.png").read_bytes() == base64.b64decode(images[0]["src"].partition(",")[2])


def test_public_tasks_show_mean_above_chance(tmp_path: Path) -> None:
    """HellaSwag (0.40 - 0.25) / 0.75 and WinoGrande (0.55 - 0.5) / 0.5: 15 percent on average."""
    rows = [
        *full_rows(), eval_row("hellaswag", 201, acc_norm=0.4, acc_norm_stderr=0.003),
        eval_row("winogrande", 201, acc=0.55, acc_norm=0.55, acc_norm_stderr=0.01, chance=0.5),
    ]  # fmt: skip
    page = page_of(write_run(tmp_path / "runs/small", rows))
    assert page.cards()["Mean above chance"] == "15.0 %"
    texts = [text.replace("\xa0", " ") for _, text in page.texts]
    assert any("± 1.0 %; 0 is guessing; HellaSwag, WinoGrande" in text for text in texts)
    assert any("55.0 %" in text for text in texts)


def test_cards_show_latest_values(page: Page) -> None:
    assert page.cards() == {
        "Validation loss": "3.2500",
        "Perplexity": f"{math.exp(3.25):.2f}",
        "Bits per byte": "1.6250",
        "Cloze accuracy": "31.0 %",
        "HellaSwag accuracy": "27.0 %",
        "Tokens seen": "200k",
        "Tokens per second": "2k",
        "Training time": "2 min",
        "Parameters": "7.34M",
    }


def test_counts_unreadable_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [train_row(5)])
    run.metrics.write_text(run.metrics.read_text() + '{"kind": "tr')
    assert page_of(run).texts[-1] == ("footer", "Made from 1 rows of metrics.jsonl; 1 unreadable lines skipped.")


def test_diverged_run_shows_nan(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", [train_row(5), train_row(10, loss=math.nan)]))
    assert page.cards()["Training loss"] == "NaN"
    assert "Validation loss" not in page.cards()


def test_shows_first_and_last_samples_escaped(reported: RunPaths, page: Page) -> None:
    assert "<script" not in reported.report.read_text(encoding="utf-8")
    texts = [text for _, text in page.texts]
    assert "Hello <b>you</b>" in texts
    assert "<script>alert('x')</script> & noise" in texts
    assert "at the end" in texts
    assert "in the middle" not in texts


def test_escapes_html_in_all_values(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<img src=x>", [train_row(5)])
    run.config.write_text(json.dumps({"<i>": "<u>", "model": {"<s>": "<q>"}, "train": "<p>"}))
    run.environment.write_text(json.dumps({"device_name": "<h6>", "command": ["<em>"], "parameters": "<li>"}))
    page = page_of(run)
    assert not {"i", "u", "s", "q", "h6", "em", "li"} & {tag for tag, _ in page.tags}
    assert all(image["alt"] for image in page.images())


def test_evaluation_table_is_ordered_by_step(page: Page) -> None:
    cells = [text.replace("\N{NO-BREAK SPACE}", " ") for tag, text in page.texts if tag == "td"]
    assert cells[:8] == ["0", "0", "10.5000", "36.3k", "5.2500", "0.0 %", "31.0 %", "27.0 %"]
    assert cells[8:14] == ["100", "100k", "4.0000", "54.60", "2.0000", "20.0 %"]  # no cloze at this step
    assert cells[14] == "200"


def test_activities_are_sorted_by_duration(tmp_path: Path) -> None:
    rows = [train_row(200), {"kind": "overhead", "step": 200, "seconds": {"validation": 60.0, "<b>": 820.0}}]
    rows += [{"kind": "apart", "step": 200, "seconds": {"validation": 20.0}}]  # its kind in earlier versions
    page = page_of(write_run(tmp_path / "run", rows))
    cells = [text.replace("\N{NO-BREAK SPACE}", " ") for tag, text in page.texts if tag == "td"]
    assert cells[:6] == ["<b>", "14 min", "82.0 %", "training", "98 s", "9.8 %"]
    assert cells[6:12] == ["validation", "80 s", "8.0 %", "waiting for data", "2 s", "0.2 %"]
    widths = [attributes["style"] for tag, attributes in page.tags if tag == "span" and attributes.get("title")]
    assert widths[0] == "width: 82.000%; background: #0072b2"


def test_thinned_evaluations_keep_first_and_last(tmp_path: Path) -> None:
    rows = [train_row(1_000), *(validation_row(step, 3.0) for step in range(0, 1_001, 10))]
    page = page_of(write_run(tmp_path / "run", rows))
    text = " ".join(text for _, text in page.texts)
    assert "25 of 101 evaluated steps" in text
    steps = [text for tag, text in page.texts if tag == "td"][::6][:25]
    assert (steps[0], steps[-1]) == ("0", "1,000")


def test_resume_command_omits_fresh_flag(page: Page) -> None:
    commands = [text for tag, text in page.texts if tag == "pre"]
    assert commands[0] == "python pretrain.py debug"
    assert commands[1] == "myllm sample small --prompt 'Hello <b>you</b>'"


def test_finished_run_has_no_resume_command(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs/whole", full_rows())
    config = json.loads(run.config.read_text())
    run.config.write_text(json.dumps(config | {"train": {"max_steps": 200}}))
    run.environment.write_text(json.dumps({"command": ["python", "pretrain.py", "debug", "--name", "a b"]}))
    texts = [text for _, text in page_of(run).texts]
    assert "Resume training" not in texts
    assert "python pretrain.py debug --name 'a b'" in texts


def test_blank_lines_do_not_stretch_samples(tmp_path: Path) -> None:
    blanks = {"step": 200, "prompt": "class", "text": "\n" * 400 + "end", "seed": 1}
    run = write_run(tmp_path / "runs/blanks", full_rows(), [blanks, blanks | {"prompt": "\n" * 200}])
    with chromium(tmp_path / "profile") as browser:
        browser.open(write_report(run).as_uri(), width=390, dark=True, ready="document.querySelector('.sample')")
        heights = browser.run("[...document.querySelectorAll('.sample')].map(e => e.offsetHeight)")
        assert max(heights) < 700
        assert browser.run("document.querySelector('.text').textContent").endswith("end")


def test_plots_follow_color_scheme(reported: RunPaths, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as browser:
        for dark in (False, True):
            browser.open(reported.report.as_uri(), dark=dark, ready="document.querySelector('figure img')?.complete")
            browser.run("document.querySelector('figure').scrollIntoView()")
            browser.screenshot(tmp_path / "page.png")
            brightness = np.median(imread(tmp_path / "page.png")[100:300, 200:1000, :3])
            assert (brightness < 0.4) == dark


def test_concurrent_report_writes(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own report and `myllm report` at the same time: neither fails, and no image is truncated."""
    monkeypatch.setattr(plots, "PLOTS", {name: plots.PLOTS[name] for name in ("loss", "loss_compact")})
    children, ready = [], os.pipe()
    for _ in range(3):
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.close(ready[1])
                os.read(ready[0], 1)  # wait for the other processes
                for _ in range(3):
                    page = page_of(run)
                    for source in [image["src"] for image in page.images()]:
                        imread(io.BytesIO(base64.b64decode(str(source).partition("base64,")[2])))
                code = 0
            finally:  # never return into pytest
                os._exit(code)
        children.append(child)
    os.close(ready[1])
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert not list(run.root.rglob("*.tmp"))


def test_eval_results_table(run: RunPaths, tmp_path: Path) -> None:
    assert "myllm eval" not in write_report(run).read_text(encoding="utf-8")
    settings = {"protocol": "lm-eval", "examples": 100, "data_sha256": "1a2b3c"}
    for step, accuracy in ((200, 0.31), (100, 0.29)):  # that of step 100 came later, of an earlier checkpoint
        metrics = {"acc": 0.5, "acc_norm": accuracy, "acc_norm_stderr": 0.011, "n_examples": 100}
        add(run.evals, Result("piqa", "x", step, "float32", settings, metrics, "cpu", 1.0))
    write_report(run)
    texts = [text for tag, text in Page(run.report.read_text(encoding="utf-8")).texts if tag == "td"]
    at = texts.index("PIQA accuracy")
    values = [format_percent(0.31), f"± {format_percent(0.011)}", "200", "protocol lm-eval, examples 100, float32"]
    assert texts[at + 1 : at + 5] == values
    assert texts.count("PIQA accuracy") == 1
    with chromium(tmp_path / "profile") as browser:
        browser.open(run.report.as_uri(), width=390, ready="true")
        assert browser.run("document.documentElement.scrollWidth") <= 390
