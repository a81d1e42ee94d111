"""Write docs/modules.md from the first line of each module's docstring: `python docs/list_modules.py`."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/myllm"
ORDER = (
    "cli",
    "training",
    "evals",
    "inference",
    "hub",
    "runs",
    "checkpoint",
    "data",
    "distributed",
    "model",
    "optim",
    "planning",
)


def first_line(module: Path) -> str:
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).removesuffix(" Read it in this order:")


def section(folder: Path, level: str = "##") -> Iterator[str]:
    """A package: its heading, what it is for, a table of its modules, and then its own packages."""
    name = "myllm" if folder == PACKAGE else folder.relative_to(PACKAGE).as_posix()
    yield from ("", f"{level} {name}", "", first_line(folder / "__init__.py"))
    yield from ("", "| module | what it is for |", "|---|---|")
    for module in sorted(folder.glob("*.py")):
        if module.name != "__init__.py":
            path = module.relative_to(PACKAGE)
            yield f"| [`{path}`](../src/myllm/{path}) | {first_line(module)} |"
    for package in sorted(folder.glob("*/__init__.py")):
        if folder != PACKAGE:
            yield from section(package.parent, "###")


def page() -> str:
    lines = [
        "# Modules",
        "",
        "Written by `python docs/list_modules.py`. A package imports only from those below it on this page.",
        *(line for name in ORDER for line in section(PACKAGE / name)),
        *section(PACKAGE),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/modules.md").write_text(page(), encoding="utf-8")
