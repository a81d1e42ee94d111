"""The pages in docs/: the site that is built of them, and the commands in them."""

import base64
import contextlib
import fnmatch
import functools
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from conftest import ROOT, tiny_config, write_run_config
from torch.distributed.run import parse_args as parse_torchrun

from myllm.cli.ladder.command import LadderArgs
from myllm.cli.launch import RunArgs, parse_args, parse_run_args
from myllm.cli.main import COMMANDS, TAKES_WORDS
from myllm.cli.main import main as myllm
from myllm.cli.parse import parse_arguments
from myllm.cli.plan import PlanArgs, PreflightArgs
from myllm.cli.tune.command import TuneArgs
from myllm.config import RunConfig
from myllm.inference import initial_weights

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SITE = ROOT / "docs/site/mkdocs.yml"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`((?:myllm|python pretrain\.py) [^`\n]+)`")
SETTING = re.compile(r"--((?:model|data|optim|train|eval|hub)\.[a-z][\w.-]*\w)")
PROGRAM = re.compile(r"myllm|(?:.*/)?pretrain\.py|\./run_pre_training_e2e(?:_debug)?\.sh")
LAUNCHERS = {"torchrun", "myllm.distributed.elastic"}
SCHEMATIC = re.compile(r"\.\.\.|COMMAND|\[.*\]?")
PLACEHOLDERS = {"PRESET": "debug", "NAME": "debug", "N": "8", "NAMESPACE/NAME": "account/name"}
SCRIPT_OPTIONS = {"--force": 0, "--no-preflight": 0, "--max-hours": 1, "--dollars-per-hour": 1}
"""Options that run_pre_training_e2e.sh keeps for itself, with the number of their values."""


# ---- The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it: links that lead nowhere, in pages and to headings, are errors."""
    pytest.importorskip("material", reason="the site needs mkdocs-material: src/environment.sh --dev installs it")
    folder, temp_data = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("temp_data")
    write_executed_copy(ROOT / "notebooks/01_self_attention.ipynb", temp_data / "notebooks")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(SITE), "-d", str(folder)]
    environment = os.environ | {"MYLLM_DATA": str(temp_data)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


PICTURE = (ROOT / "assets/tune_report.png").read_bytes()


def write_executed_copy(path: Path, folder: Path) -> None:
    """A notebook whose last cell has printed, drawn and shown a table."""
    notebook = nbformat.read(path, as_version=4)
    cell = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="\x1b[1mit <b>\x1b[0m"),
        nbformat.v4.new_output("stream", name="stdout", text=" printed\n"),
        nbformat.v4.new_output("stream", name="stderr", text="a warning\n"),
        nbformat.v4.new_output(
            "display_data", {"image/png": base64.b64encode(PICTURE).decode(), "text/plain": "Figure"}
        ),
        nbformat.v4.new_output("execute_result", {"text/markdown": "| a |\n|---|\n| bc |", "text/plain": "Markdown"}),
    ]
    folder.mkdir()
    nbformat.write(notebook, folder / path.name)


def test_site_shows_executed_notebook_outputs(site: Path) -> None:
    executed = (site / "notebooks/01_self_attention.ipynb.html").read_text(encoding="utf-8")
    assert re.search(r'class="language-text output highlight">.*it &lt;b&gt; printed\n', executed)
    assert "<td>bc</td>" in executed
    assert "a warning" not in executed
    picture = re.search(r'<img [^>]*src="([^"]+)"', executed)[1]
    assert (site / "notebooks" / picture).read_bytes() == PICTURE
    other = (site / "notebooks/02_masked_attention.ipynb.html").read_text(encoding="utf-8")
    assert "to see its figures" in other
    assert "to see its figures" not in executed


def test_site_is_complete_and_self_contained(site: Path) -> None:
    for page in (*PAGES, *ROOT.glob("src/**/README.md")):
        path = page.relative_to(ROOT)
        built = site / (path.parent / "index.html" if page.name == "README.md" else path.with_suffix(".html"))
        html = built.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe|link)[^>]* (?:src|href)="?(?:https?:)?//[^> ]*', html), page


def test_site_executes_changed_notebooks_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SITE.parent)
    import notebook_pages

    monkeypatch.setattr(notebook_pages, "NOTEBOOKS", tmp_path)
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path / "temp_data"))
    cells = [nbformat.v4.new_markdown_cell("# Sum"), nbformat.v4.new_code_cell("print(19 + 23)")]
    for name in ("sum", "metric_graphs"):  # the second needs a run
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    notebook_pages.main()
    notebook_pages.main()
    assert capsys.readouterr().out.count("executing sum.ipynb") == 1
    assert "~~~~{.text .output}\n42\n~~~~" in notebook_pages.notebook_page(tmp_path / "sum.ipynb")[0]
    assert "42" not in notebook_pages.notebook_page(tmp_path / "metric_graphs.ipynb")[0]
    cells[1].source = "print(19 + 24)"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "sum.ipynb")
    assert "to see its figures" in notebook_pages.notebook_page(tmp_path / "sum.ipynb")[0], "the copy is of other code"


def test_built_pages_have_no_broken_links(site: Path) -> None:
    broken = [
        f"{page.relative_to(site)}: {target}"
        for page in site.rglob("*.html")
        if page.name != "404.html"  # its links begin at the site's root
        for target in set(re.findall(r'(?:href|src)="([^":#?]+)["#?]', page.read_text(encoding="utf-8")))
        if not (page.parent / target).exists()
    ]
    assert not broken


def test_navigation_lists_all_pages() -> None:
    def pages(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from pages(child)

    text = SITE.read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(pages(yaml.safe_load(f"nav:{text}")))
    expected = {path.relative_to(ROOT).as_posix() for path in (*PAGES, *ROOT.glob("docs/experiments/*.md"))}
    assert not expected - listed, "add these to nav in docs/site/mkdocs.yml"


# ---- Commands


def commands() -> Iterator[Any]:
    """The words of each command in a shell's code block, or in the text if more than its name is given there."""
    names = {f"myllm {name}" for name in COMMANDS}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [block for language, block in FENCE.findall(text) if language in ("sh", "bash")]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += [code for code in INLINE.findall(FENCE.sub("", text)) if code not in names]
        for line in lines:
            for words in simple_commands(line):
                if program_index(words) is not None and not any(map(SCHEMATIC.fullmatch, words)):
                    yield pytest.param(words, id=f"{page.stem}: {' '.join(words)}"[:80])


def program_index(words: list[str]) -> int | None:
    """Where our program is; `myllm` is also the name of an image and a volume of Docker."""
    for index, word in enumerate(words):
        if PROGRAM.fullmatch(word) and (word != "myllm" or words[max(index - 1, 0)] in ("myllm", "-m")):
            return index
    return None


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command in a line of shell, without operators such as | and ;"""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # a quotation that goes on in the next line: not one of ours
        return
    operator = re.compile(r"[();<>|&]+")
    for is_operator, group in itertools.groupby(words, key=lambda word: bool(operator.fullmatch(word))):
        if not is_operator:
            yield [PLACEHOLDERS.get(word, word) for word in group]


@pytest.fixture
def parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands do nothing but note what they were given; there is a folder with runs that config files are of."""
    called: list[str] = []

    def stand_in(name: str) -> Callable[..., None]:
        @functools.wraps(COMMANDS[name])
        def command(*values: Any, **options: Any) -> None:
            called.append(name)

        return command

    def of_preset(name: str) -> Callable[[list[str]], None]:
        kinds: dict[str, type[RunArgs]] = {"plan": PlanArgs, "preflight": PreflightArgs, "tune": TuneArgs}
        kind = kinds.get(name, RunArgs)

        def command(words: list[str]) -> None:
            if name == "ladder":
                parse_arguments(LadderArgs, words, "myllm ladder")
            elif words not in (["--table"], []):
                parse_run_args(kind, words, f"myllm {name}")
            called.append(name)

        return command

    for name in list(COMMANDS):
        monkeypatch.setitem(COMMANDS, name, of_preset(name) if name in TAKES_WORDS else stand_in(name))
    for name in ("find_source", "check_fits"):  # the models that the commands name are not there
        monkeypatch.setattr(initial_weights, name, lambda *_: None)
    monkeypatch.setattr(initial_weights, "initial_model", lambda config, _: config.model)
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path / "temp_data"))
    monkeypatch.chdir(tmp_path)
    return called


@pytest.mark.parametrize("words", list(commands()))
def test_documented_command_parses(words: list[str], parsed: list[str], tmp_path: Path) -> None:
    """By the real parsers, which know every command, option and type of value, and without doing what it says."""
    for config in (word for word in words if word.endswith("/config.json")):
        (tmp_path / config).parent.mkdir(parents=True)
        write_run_config(tiny_config(tmp_path), tmp_path / config)
    if launcher := LAUNCHERS & set(words):
        parse_torchrun(words[words.index(launcher.pop()) + 1 :])
    start = program_index(words)
    program, rest = words[start], words[start + 1 :]
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            if program == "myllm":
                myllm(rest)
            else:
                parse_args(without_script_options(rest) if program.endswith(".sh") else rest)
            code = 0
        except SystemExit as ended:
            code = ended.code
    assert not code, output.getvalue()
    assert parsed or output.getvalue() or program != "myllm"


def without_script_options(words: list[str]) -> list[str]:
    rest, skip = [], 0
    for word in words:
        if skip:
            skip -= 1
        elif word in SCRIPT_OPTIONS:
            skip = SCRIPT_OPTIONS[word]
        else:
            rest.append(word)
    return rest if rest and not rest[0].startswith("-") else ["lf-llm-269m", *rest]


def test_documented_settings_exist() -> None:
    known = {
        f"{section.name}.{setting.name}".replace("_", "-")
        for section in fields(RunConfig)
        if hasattr(getattr(RunConfig(), section.name), "__dataclass_fields__")
        for setting in fields(getattr(RunConfig(), section.name))
    }
    unknown = [
        f"{page.name}: --{option}"
        for page in PAGES
        for option in SETTING.findall(page.read_text(encoding="utf-8"))
        if option.replace("_", "-") not in known and page.name != "CHANGELOG.md"
    ]
    assert not unknown


# ---- docs/deploy


def test_lock_file_has_hashes_and_covers_requirements() -> None:
    text = (ROOT / "docs/deploy/requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text, "an index of one machine must not be everybody's"
    locked = {line.split()[0] for line in text.splitlines() if not line.startswith(" ")}
    pins = {line.lower().replace("_", "-") for line in (ROOT / "requirements.txt").read_text().split() if "==" in line}
    assert pins <= locked, "run: make lock"
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=\S)", text.strip()))


def test_deployment_files_are_valid() -> None:
    task = yaml.safe_load((ROOT / "docs/deploy/skypilot.yaml").read_text())
    for script in (task["setup"], task["run"]):
        assert not subprocess.run(["bash", "-n"], input=script, text=True).returncode
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    dockerfile = ROOT / ".devcontainer" / container["build"]["dockerfile"]
    assert container["workspaceFolder"] in dockerfile.read_text(), "environment.sh marks an installation by its folder"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_docker_context_matches_git() -> None:
    patterns = [
        line for line in (ROOT / "docs/deploy/Dockerfile.dockerignore").read_text().split("\n") if line[:1] not in "#"
    ]

    def sent(path: str) -> bool:
        whole, excluded = Path(path), False
        for pattern in patterns:
            glob = pattern.removeprefix("!").replace("**/", "*/")
            names = [f"/{name}" if glob.startswith("*/") else str(name) for name in (whole, *whole.parents[:-1])]
            if fnmatch.filter(names, glob):
                excluded = not pattern.startswith("!")
        return not excluded

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert [path for path in tracked[:-1] if not sent(path)] == []
    ignored = [line for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("!")]
    examples = [line.rstrip("/").replace("*", "x") + "/file" for line in ignored]
    assert [path for path in (*examples, ".git/HEAD", "src/myllm/__pycache__/a.pyc") if sent(path)] == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("myllm ev", "eval"),
        ("myllm data pre", "prepare"),
        ("myllm eval --str", "--stride"),
        ("myllm eval my", "my-run"),
        ("myllm plan debug --train.mi", "--train.micro-batch-size"),
    ],
)
def test_completion(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "runs/my-run").mkdir(parents=True)
    environment = os.environ | {"MYLLM_DATA": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    words = line.split()
    script = f"source {ROOT}/docs/deploy/completion.bash; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
    script += '_myllm; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == [expected], done.stderr
