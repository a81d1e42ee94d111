"""Every notebook runs from its first cell to its last, on small runs that the tests write."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from myllm.cli.ladder.analysis import Target, analyze
from myllm.cli.ladder.fit import Losses
from myllm.config import ModelConfig, RunConfig, to_dict
from myllm.data.tokenizer.load import load_tokenizer
from myllm.hub.export.source import ExportSource
from myllm.hub.export.transformers import export_transformers
from myllm.inference.completion import generate
from myllm.inference.load import LanguageModel
from myllm.model.transformer import Transformer
from myllm.presets import get_preset

SHAPE = ModelConfig(max_seq_len=64, d_model=16, n_layers=1, n_heads=2, d_ff=32)
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

PATIENCE = {"timeout": 300, "startup_timeout": 300, "iopub_timeout": 300}
"""Seconds. By default a cell's output counts that comes within 4 s of its end."""

# What each notebook's parameter cells are set to. A new notebook needs an entry here.
PARAMETERS: dict[str, dict[str, Any]] = {
    "01_self_attention.ipynb": {},
    "02_masked_attention.ipynb": {},
    "03_multihead_attention.ipynb": {},
    "04_architecture.ipynb": {},
    "04b_inside_a_block.ipynb": {},
    "04c_a_trained_model.ipynb": {},
    "05_data.ipynb": {},
    "06_training.ipynb": {},
    "06b_settings.ipynb": {},
    "06c_processes_and_checkpoints.ipynb": {},
    "hf_sampling.ipynb": {"MODEL": "exported", "PROMPTS": ["the river"]},
    "metric_graphs.ipynb": {"RUN": "first", "RUNS": ["first", "second"]},
    "parameters_costs.ipynb": {},
    "parameters_tuning.ipynb": {},
}


def write_run(folder: Path, final_loss: float) -> None:
    """A run folder as training leaves it, with made-up numbers."""
    rows: list[dict[str, Any]] = []
    for step in range(0, 101, 5):
        loss = final_loss + 6 * math.exp(-step / 20)
        if step:
            rows.append(
                {"kind": "train", "step": step, "tokens": step * 2_048, "loss": loss, "lr": 1e-3, "grad_norm": 0.5,
                 "step_s": 0.2, "tokens_per_s": 10_240.0, "mfu": None, "data_wait_s": 0.001}
            )  # fmt: skip
        if step % 50 == 0:
            rows.append(
                {"kind": "eval", "name": "validation", "step": step, "loss": loss, "perplexity": math.exp(loss),
                 "bits_per_byte": loss / 2.5, "token_accuracy": 0.1, "seconds": 0.1}
            )  # fmt: skip
            rows.append({"kind": "eval", "name": "cloze", "step": step, "acc": 0.3, "acc_norm": 0.31, "n_examples": 9})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"name": folder.name, "optim": {"max_grad_norm": 1.0}}))


def write_export(folder: Path) -> None:
    """An exported untrained model."""
    config, tokenizer = RunConfig(name="exported", model=SHAPE), load_tokenizer()
    source = ExportSource(config, 1, 1, tokenizer, Transformer(SHAPE).state_dict())
    export_transformers(source, folder, say=lambda _: None)


def write_ladder(file: Path) -> None:
    """A ladder of two recipes, two sizes and two lengths, with made-up losses."""
    means = np.array([[[4.0, 3.6], [3.9, 3.5]], [[3.7, 3.5], [3.6, 3.4]]])  # recipe, size, length
    losses = Losses(("reference", "modern"), np.array([1e5, 2e5]), np.array([1e6, 2e6]), means[..., None].repeat(2, -1))
    analysis = analyze(losses, np.ones(losses.values.shape), Target("far", 3e8, 1e10))
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"recipes": losses.recipes, "analysis": analysis}))


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with two runs and an exported model, where the notebook's kernel looks."""
    write_run(tmp_path / "runs/first", final_loss=4.25)
    write_run(tmp_path / "runs/second", final_loss=3.5)
    write_export(tmp_path / "exported")
    write_ladder(tmp_path / "ladder/made/ladder.json")
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as Colab sets it
    return tmp_path


def set_parameters(notebook: nbformat.NotebookNode, values: dict[str, Any]) -> None:
    """Replace the cells `NAME = ...` of a notebook; every name must have exactly one."""
    for name, value in values.items():
        cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(f"{name} = ")]
        assert len(cells) == 1, f"{name} is set by {len(cells)} cells"
        cells[0].source = f"{name} = {value!r}"


def execute(path: Path, values: dict[str, Any], folder: Path) -> nbformat.NotebookNode:
    """Run a notebook and return it with its outputs; an exception in a cell fails the test."""
    notebook = nbformat.read(path, as_version=4)
    set_parameters(notebook, values)
    NotebookClient(notebook, **PATIENCE, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_notebooks_exist() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_has_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert "version" not in notebook.metadata.get("language_info", {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def reading_minutes(path: Path) -> float:
    """At 200 words of prose and 30 lines of code a minute. The install cell, equal in all, is skipped."""
    cells = nbformat.read(path, as_version=4).cells
    words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    code = [cell.source for cell in cells if cell.cell_type == "code" and "%pip install" not in cell.source]
    lines = sum(bool(line.strip()) for source in code for line in source.splitlines())
    return words / 200 + lines / 30


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_read_in_ten_minutes(path: Path) -> None:
    """And in about the time that the table of all notebooks says."""
    assert reading_minutes(path) <= 10
    table = (ROOT / "docs/how_it_works.md").read_text(encoding="utf-8")
    said = re.search(rf"^\| \[{path.stem}\]\(.*?\) \| (\d+) \|", table, re.MULTILINE)
    assert said, f"add {path.name} to docs/how_it_works.md"
    assert int(said[1]) == pytest.approx(reading_minutes(path), abs=1)


def test_notebooks_lead_to_the_next() -> None:
    """In the order of their names; metric_graphs and hf_sampling stand alone."""
    course = [path for path in NOTEBOOKS if path.name not in ("hf_sampling.ipynb", "metric_graphs.ipynb")]
    for path, following in itertools.pairwise(course):
        last = nbformat.read(path, as_version=4).cells[-1].source
        assert f"**Next:** [{following.stem}]({following.name})" in last


def test_every_package_is_explained() -> None:
    """In a table of a notebook, with a link."""
    cells = [cell.source for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    explained = {name for source in cells for name in re.findall(r"\[`(\w+)/`\]\(../src/myllm/\1/", source)}
    assert {path.parent.name for path in ROOT.glob("src/myllm/*/__init__.py")} <= explained


QUICK = "01_self_attention.ipynb"
"""In `make test`, so that a broken way of running notebooks is seen there; the others in `make test-slow`."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.name == QUICK else pytest.mark.slow, id=path.name) for path in NOTEBOOKS],
)
def test_notebook_runs(path: Path, data_folder: Path) -> None:
    assert path.name in PARAMETERS, f"add {path.name} to PARAMETERS"
    shown = outputs(execute(path, PARAMETERS[path.name], data_folder))
    stderr = "".join(output.get("text", "") for output in shown if output.get("name") == "stderr")
    # transformers imports torchao if it is installed, which warns about kernels for other machines.
    noise = [line for line in stderr.splitlines() if not re.search("torchao|torch/utils/_pytree.py", line)]
    assert noise == [], "a notebook that warns teaches its readers to ignore warnings"
    if path.name in CHECKS:
        CHECKS[path.name](
            [output.data["text/markdown"] for output in shown if "text/markdown" in output.get("data", {})],
            "".join(output.text for output in shown if output.get("name") == "stdout"),
            sum("image/png" in output.get("data", {}) for output in shown),
        )


def check_metric_graphs(tables: list[str], stdout: str, pictures: int) -> None:
    assert pictures == 7  # loss, perplexity, rate, gradient norm, throughput, accuracy, and the comparison
    last_loss = 4.25 + 6 * math.exp(-100 / 20)
    assert f"| train | 100 | loss | {last_loss:.6g} |" in tables[0]
    assert "| cloze | 100 | acc_norm | 0.31 |" in tables[0]


def check_parameters_costs(tables: list[str], stdout: str, pictures: int) -> None:
    """What the text claims of the changes: width is cheaper than depth; 8/3 of the width costs what GELU costs."""
    assert pictures == 1
    rows = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in tables[0].splitlines()[2:])}
    assert rows["as it is"][0].strip() == "320M"
    narrow = rows["deep and narrow"]
    assert [narrow[0].strip(), narrow[2].strip()] == ["322M", "108%"]
    assert int(narrow[4].strip("% ")) == pytest.approx(130, abs=2)
    gelu, narrower = (
        float(rows[name][1].split()[0]) for name in ("GELU instead of SwiGLU", "SwiGLU with 8/3 of the width")
    )
    assert narrower == pytest.approx(gelu, rel=0.02)


def check_parameters_tuning(tables: list[str], stdout: str, pictures: int) -> None:
    assert pictures == 4
    # 226 of 19,073 steps; 10B tokens for 320M parameters.
    assert (
        "| lf-llm-269m | 320M | 16 | 1,024 | 16 | 4,096 | 2,048 | 524k | 0.0021 | 118M (1.18%) | 10B | 31 |"
        in tables[0]
    )
    # 3.6 lies halfway between the second recipe's losses, so 2M / (1M x 2^0.5), by interpolation in log tokens.
    assert re.search(r"\| modern \| reference \| 100k \| 2M \| 3.6000 \| 1\.4\d ", tables[-1])
    assert "No ladder.json" not in stdout


def check_multihead_attention(tables: list[str], stdout: str, pictures: int) -> None:
    """What the text claims of the trained heads: some look mostly 2 back, some mostly 5 back."""
    heads = re.findall(r"Head \d of 4 +2 back ([\d.]+) +5 back ([\d.]+)", stdout)
    assert len(heads) == 4
    assert max(float(near) for near, _ in heads) > 0.5
    assert max(float(far) for _, far in heads) > 0.5
    assert "| 16 x 64 | 4 | 294.8M | 2.17 G | 32 MiB |" in tables[0]


def check_architecture(tables: list[str], stdout: str, pictures: int) -> None:
    """What the text claims of the first loss, of models with and without a tied head."""
    assert pictures == 1
    assert "| logits (the head's product) | (2, 10, 50257) | 3,219,456 |" in tables[0]
    assert "ours and the project's agree" in stdout
    assert "the project's block and PyTorch's agree" in stdout
    debug, debug_code = map(
        float, re.search(r"\| debug \| 6.6M \| 3.4M \| [\d.]+ \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|", tables[1]).groups()
    )
    assert debug == pytest.approx(math.log(50_257), abs=0.05)
    assert debug_code == pytest.approx(10.95, abs=0.09)  # as the run of the README, which reads other code
    tied, tied_code = map(
        float, re.search(r"\| small-50m .* ([\d.]+) \| ([\d.]+) \|$", tables[1], re.MULTILINE).groups()
    )
    assert tied == pytest.approx(math.sqrt(512) * 0.63, abs=0.3)
    assert tied_code < tied


def check_block(tables: list[str], stdout: str, pictures: int) -> None:
    assert pictures == 3
    assert "a score depends on the distance alone" in stdout
    plain, normed = re.search(r"weights x 100 +largest score +([\d.]+) +with QK-norm ([\d.]+)", stdout).groups()
    assert float(plain) > 10_000
    assert float(normed) <= 4  # √K
    assert re.findall("([\\d,]+) parameters", stdout) == ["73,728", "73,728"]


def check_trained_model(tables: list[str], stdout: str, pictures: int) -> None:
    """What the text claims of the trained model: better than pairs of letters, with heads that have specialized."""
    assert pictures == 3
    first, last, pairs = map(float, re.findall(r"(?:first loss|last|pairs of letters) ([\d.]+)", stdout))
    assert first == pytest.approx(math.log(128), abs=0.4)
    assert last < pairs
    assert float(re.search(r"largest mean weight at one distance: ([\d.]+)", stdout)[1]) > 0.2


def check_data(tables: list[str], stdout: str, pictures: int) -> None:
    assert pictures == 2
    assert "| English | 44 | 44 | 9 | 4.9 |" in tables[0]
    assert "pret | raining" in stdout
    digests = dict(re.findall(r"^(\w[\w ]+\w) +([0-9a-f]{32})$", stdout, re.MULTILINE))
    assert digests["one rank"] == digests["two ranks"] == digests["by hand"] != digests["one bit changed"]


def check_training(tables: list[str], stdout: str, pictures: int) -> None:
    """The exact checks are asserts of the notebook; here, that they were reached, and what the text says of figures."""
    assert pictures == 1
    assert "six steps by hand and six of train_step: the same weights" in stdout
    first = re.search(r"step 0 .* loss ([\d.]+) ", stdout)
    assert first
    assert float(first[1]) == pytest.approx(math.log(50_257), abs=0.1)


def check_settings(tables: list[str], stdout: str, pictures: int) -> None:
    assert pictures == 4
    assert "four micro-steps of 4 rows: the same gradient as 16 rows at once" in stdout
    cosines = [float(cosine) for cosine in re.findall(r"rows \d+: ([\d.]+)", stdout)]
    start, trained = cosines[:4], cosines[4:]
    assert len(trained) == 4
    assert start == sorted(start)
    assert all(late < early for early, late in zip(start, trained, strict=True))
    float32, bfloat16 = re.search(r"float32 ([\d.]+), matrix products in bfloat16 ([\d.]+)", stdout).groups()
    assert float(bfloat16) == pytest.approx(float(float32), abs=0.1)


def check_processes(tables: list[str], stdout: str, pictures: int) -> None:
    for conclusion in (
        "both ranks have the same gradient, and it is that of one process with all rows",
        "stopped and resumed: the same weights, bit for bit",
    ):
        assert conclusion in stdout
    assert "| weights | " in tables[0]


CHECKS = {
    "03_multihead_attention.ipynb": check_multihead_attention,
    "04_architecture.ipynb": check_architecture,
    "04b_inside_a_block.ipynb": check_block,
    "04c_a_trained_model.ipynb": check_trained_model,
    "05_data.ipynb": check_data,
    "06_training.ipynb": check_training,
    "06b_settings.ipynb": check_settings,
    "06c_processes_and_checkpoints.ipynb": check_processes,
    "metric_graphs.ipynb": check_metric_graphs,
    "parameters_costs.ipynb": check_parameters_costs,
    "parameters_tuning.ipynb": check_parameters_tuning,
}


def install_cell(path: Path) -> str:
    return next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


INSTALLING = [path for path in NOTEBOOKS if path.name != "hf_sampling.ipynb"]
"""hf_sampling needs transformers only."""


def test_install_cells_are_identical() -> None:
    """So that they open in Colab."""
    cells = {install_cell(path) for path in INSTALLING}
    assert len(cells) == 1
    assert "myllm" not in cells.pop().replace('find_spec("myllm")', "")


@pytest.mark.parametrize(
    ("repository", "folder", "installed"),
    [
        (None, "notebooks", [".."]),
        ("https://example.com/me/fork", "notebooks", [".."]),
        ("https://example.com/me/fork", "elsewhere", ["git+https://example.com/me/fork"]),
        (None, "elsewhere", "set REPOSITORY above to the address of its Git repository"),
    ],
)
def test_install_cell_source(
    repository: str | None, folder: str, installed: list[str] | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkout/notebooks").mkdir(parents=True)
    (tmp_path / "checkout/pyproject.toml").touch()
    (tmp_path / "content/elsewhere").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / ("checkout" if folder == "notebooks" else "content") / folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, found = install_cell(INSTALLING[0]).replace("%pip install --quiet {source}", "installed.append(source)"), []
    if repository:
        code = re.sub('REPOSITORY = ".*"', f'REPOSITORY = "{repository}"', code)
    if isinstance(installed, str):
        with pytest.raises(ImportError, match=installed):
            exec(code, {"installed": found})
    else:
        exec(code, {"installed": found})
        assert found == installed


@pytest.mark.slow
def test_metric_graphs_draws_published_curve(data_folder: Path) -> None:
    write_run(data_folder / "runs/repeated", final_loss=3.2)
    (data_folder / "runs/repeated/config.json").write_text(json.dumps(to_dict(get_preset("lf-llm-269m"))))
    notebook = nbformat.read(ROOT / "notebooks/metric_graphs.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("figure(")]
    set_parameters(notebook, {"RUN": "first", "RUNS": ["first", "repeated"]})
    source = (
        "for line in axes.get_lines(): print(line.get_label(), line.get_xdata()[-1], line.get_ydata()[-1], sep='|')"
    )
    notebook.cells.append(nbformat.v4.new_code_cell(source))
    NotebookClient(notebook, **PATIENCE, kernel_name="python3", resources={"metadata": {"path": data_folder}}).execute()
    lines = dict(line.split("|", 1) for line in notebook.cells[-1].outputs[0].text.splitlines())
    curve = json.loads((ROOT / "src/myllm/runs/reference.json").read_text())
    last = curve["curves"]["validation"]["points"][-1]
    assert lines[f"{curve['name']}, validation"] == f"{last['tokens']}|{last['value']}"
    assert lines.keys() >= {"first", "repeated"}


def test_hf_sampling_matches_greedy_generation(data_folder: Path) -> None:
    """With the notebook's default MODEL, run in its own folder: the README's command exports to the folder above."""
    path, folder = ROOT / "notebooks/hf_sampling.ipynb", data_folder / "notebooks"
    folder.mkdir()
    shown = outputs(execute(path, {"PROMPTS": ["the river"]}, folder))
    stdout = "".join(output.text for output in shown if output.get("name") == "stdout")
    ours = generate(LanguageModel(Transformer(SHAPE).eval(), load_tokenizer()), "the river", 50, temperature=0)
    assert stdout.startswith("LlamaForCausalLM")
    assert f"\n{ours}\n---\n" in stdout
