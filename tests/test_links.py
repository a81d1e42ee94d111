"""Links of the README, docs, notebooks and packages' notes: to our own files and headings, and elsewhere."""

import json
import re
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from conftest import ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
MODULE = re.compile(r"(?<![\w/.{}-])((?:[\w.-]+/)+\w+\.py)\b")
MODULES_OF_LIBRARIES = [
    "gpt-2/src/encoder.py",
    "huggingface_hub/utils/_validators.py",
    "tiktoken_ext/openai_public.py",
    "torch/_dynamo/device_interface.py",
    "torch/nn/attention/_fa3.py",
    "torch/optim/_muon.py",
]
ADDRESS = re.compile(r"https?://[^\s)\"'`<>\\|]+")
HOSTS = ["arxiv.org", "github.com", "huggingface.co", "kellerjordan.github.io", "reviews.llvm.org", "ui.perfetto.dev"]
"""Other sites. A new one is added by hand, so that a misspelled one is seen; `make links` visits the pages."""
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def pages() -> Iterator[tuple[Path, str]]:
    """Each page and its Markdown, without blocks of code."""
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/README.md")]):
        yield path, FENCE.sub("", path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        yield path, FENCE.sub("", text)


def anchors(markdown: str) -> set[str]:
    """The anchors of a page's headings as GitHub forms them; a heading that comes again gets a number."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ +(.+?) *$", markdown, re.M):
        words = LINK.sub(lambda link: link[0][1:].partition("]")[0], heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def test_modules_named_in_prose_exist() -> None:
    """The log of experiments keeps the names of its time."""
    texts = {page: text for page, text in pages() if "experiments" not in str(page) and page.name != "CHANGELOG.md"}
    modules = [path for folder in ("src", "benchmarks", "docs", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]
    texts |= {path: path.read_text(encoding="utf-8") for path in modules if "tests" not in path.parts}
    named = [(page, name) for page, text in texts.items() for name in MODULE.findall(text)]
    assert len(named) > 300
    paths = [*map(str, modules), *MODULES_OF_LIBRARIES]
    assert not {
        f"{page.relative_to(ROOT)}: {name}"
        for page, name in named
        if not any(f"/{path}".endswith(f"/{name.lstrip('./')}") for path in paths)
    }


def test_anchors_match_github() -> None:
    text = "# `myllm eval`: two, *or* more\n## Above [chance](x.md)\n## A\n## A\ntext # no\n"
    assert anchors(text) == {"myllm-eval-two-or-more", "above-chance", "a", "a-1"}


def test_links_resolve_to_files_and_headings() -> None:
    markdown = dict(pages())
    targets = [(page, target) for page, text in markdown.items() for target in LINK.findall(text)]
    assert len(targets) > 100
    broken = []
    for page, target in targets:
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if "://" not in target and not (path.exists() and (not anchor or anchor in anchors(markdown.get(path, "")))):
            broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_external_links_use_known_hosts() -> None:
    found = {(page.name, address) for page, text in pages() for address in ADDRESS.findall(re.sub("`[^`]*`", "", text))}
    assert len(found) > 10
    parts = {(page, urlsplit(address)[:2]) for page, address in found}
    assert not {part for part in parts if part[1] not in {("https", host) for host in HOSTS}}


def test_notebooks_use_repository_address() -> None:
    """pyproject.toml has it; `make repository` changes it there and in every file that repeats it."""
    for path in ROOT.glob("notebooks/*.ipynb"):
        for address in re.findall(r'REPOSITORY = \\"(.*?)\\"', path.read_text(encoding="utf-8")):
            assert address == REPOSITORY, f"{path.name}: run make repository URL=..."


def test_make_repository_updates_all_copies(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/ACCOUNT/REPOSITORY"\n')
    copy, other = tmp_path / "notebooks/a.ipynb", tmp_path / "README.md"
    copy.write_text('"REPOSITORY = \\"https://github.com/ACCOUNT/REPOSITORY\\"  # address\\n"')
    other.write_text("ACCOUNT/REPOSITORY")
    for words in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    command = ["make", "--silent", "--file", str(ROOT / "Makefile"), "repository"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode
    for address in ("https://github.com/me/fork", "https://example.com/new"):  # it can be changed again
        subprocess.run([*command, f"URL={address}"], cwd=tmp_path, check=True)
        assert f'Repository = "{address}"' in (tmp_path / "pyproject.toml").read_text()
        assert copy.read_text() == f'"REPOSITORY = \\"{address}\\"  # address\\n"'
    assert other.read_text() == "ACCOUNT/REPOSITORY"
    assert {path.name for path in tmp_path.glob("*")} == {".git", "README.md", "notebooks", "pyproject.toml"}
