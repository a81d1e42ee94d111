"""A hook of MkDocs: the site's pages are the repository's own files.

Each keeps its path, so that links between pages work in a checkout, on a code host and on the site. A file of code that
a page links to becomes a page too, and so does every notebook: notebook_pages.py.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from notebook_pages import notebook_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "src/**/README.md")
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)]*)?\)")
BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<content>.*?)^```$", re.M | re.S)
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".sh": "bash", ".bash": "bash", ".sbatch": "bash"}
IMAGES = {".png", ".svg"}
CODE_PAGE = """---
search: {{exclude: true}}
hide: [toc]
---
# {path}

~~~~{language}
{content}
~~~~
"""


def on_files(files: Files, config: Any) -> Files:
    """Add our pages, and the images and files of code that they link to."""
    linked: set[Path] = set()
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        files.append(File.generated(config, _address(path), abs_src_path=str(path)))
        for link in LINK.finditer(path.read_text(encoding="utf-8")):
            linked.add((path.parent / link["target"]).resolve())
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        page, pictures = notebook_page(path)
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
        files.append(File.generated(config, f"{_address(path)}.md", content=page))
        targets = {link["target"] for link in LINK.finditer(page)} - pictures.keys()
        linked |= {(path.parent / target).resolve() for target in targets}
    for path in sorted(linked):
        if path.suffix in IMAGES:
            files.append(File.generated(config, _address(path), abs_src_path=str(path)))
        elif path.is_file() and path.suffix not in {".md", ".ipynb"}:
            text, language = path.read_text(encoding="utf-8"), LANGUAGES.get(path.suffix, "text")
            page = CODE_PAGE.format(path=_address(path), language=language, content=text)
            files.append(File.generated(config, f"{_address(path)}.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of code lead to their pages. The site has no folders: their links become plain text.

    Text in columns scrolls on a phone; other text without a language wraps (site.css).
    """
    folder = (ROOT / page.file.src_uri).parent

    def rewrite(link: re.Match[str]) -> str:
        path = folder / link["target"]
        if path.is_dir():
            return link["text"]
        if path.is_file() and path.suffix not in IMAGES | {".md"}:
            return f"[{link['text']}]({link['target']}.md)"
        return link[0]

    def align(block: re.Match[str]) -> str:
        in_columns = not block["language"] and re.search(r"\S {2,}\S", block["content"])
        return f"```{{.text .columns}}\n{block['content']}```" if in_columns else block[0]

    return BLOCK.sub(align, LINK.sub(rewrite, markdown))


def _address(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
