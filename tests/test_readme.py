"""The README's figures and commands, from a whole debug run."""

import faulthandler
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, eval_rows

from myllm.hub.architectures import CLASSES, select_architecture
from myllm.planning.forecast import parse_hardware, predict
from myllm.presets import PRESETS, get_preset

README = (ROOT / "README.md").read_text(encoding="utf-8")
EVALUATE = (ROOT / "docs/evaluate.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_debug_run_reproduces_readme_results(tmp_path: Path) -> None:
    """The loss varies by some 0.01 between machines and numbers of threads; three standard errors for cloze."""
    first, last = map(float, re.search(r"validation loss \[?([\d.]+)(?:\]\(\S+\))? → ([\d.]+)", README).groups())
    cloze, error = map(float, re.search(r"scores (\d+)% with a standard error of ([\d.]+) points", EVALUATE).groups())
    faulthandler.cancel_dump_traceback_later()  # minutes on a quiet machine: only the timeout below counts
    command = [sys.executable, str(ROOT / "pretrain.py"), "debug"]
    environment = os.environ | {"MYLLM_DATA": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3_000, check=False)
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in eval_rows(tmp_path / "runs/debug", "validation")]
    assert losses[0] == pytest.approx(first, abs=0.05)
    assert losses[-1] == pytest.approx(last, abs=0.1)
    accuracy = eval_rows(tmp_path / "runs/debug", "cloze")[-1]["acc"]
    assert 100 * accuracy == pytest.approx(cloze, abs=3 * error)


def test_preset_table_matches_code() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \|[^|]*\| ([\d.]+)([MB]) \| (\w+) \|([^|]*)\|([^|]*)\| ([\w-]+) \|$", README, re.M
    )
    assert {row[0] for row in rows} == set(PRESETS), "README.md has a table of presets, one row each"
    for name, tokens, unit, optimizer, *hours, opens_as in rows:
        config = get_preset(name)
        train = config.train
        assert float(tokens) * {"M": 1e6, "B": 1e9}[unit] == pytest.approx(
            train.max_steps * train.batch_tokens, rel=0.03
        )
        assert optimizer.lower() == config.optim.optimizer
        assert CLASSES[select_architecture(config.model)].startswith(opens_as.replace("-", ""))
        for text, hardware in zip(hours, ("1xRTX4090", "8xA100-80"), strict=True):
            if text.strip():
                low_high = [float(number) for number in re.findall(r"[\d.]+", text)]
                assert low_high == pytest.approx(predict(config, parse_hardware(hardware)).hours, rel=0.05), name


def test_paths_in_pages_exist() -> None:
    """Names of our own modules, tests and benchmarks in backticks or code blocks."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]  # the pages of the log keep the names of their time
    paths = re.compile(r"(?:src/myllm|tests|benchmarks|docs|notebooks)/[\w/.-]*\.(?:py|md|sh|ipynb|json|sbatch)")
    broken = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in pages
        for path in paths.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / path).exists()
    ]
    assert not broken, "these files are not there"


def test_pages_are_short() -> None:
    pages = set(ROOT.glob("docs/**/*.md")) - {ROOT / "docs/modules.md"}  # a line for each module
    assert not [page.name for page in pages if page.read_text(encoding="utf-8").count("\n") > 200], "at most 200 lines"
    assert README.count("\n") <= 220, "README.md has at most 220 lines: move details to a page in docs/"


def test_module_list_is_current() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    from list_modules import page

    assert page() == (ROOT / "docs/modules.md").read_text(encoding="utf-8"), "run: python docs/list_modules.py"
