"""The notebooks as pages of the site, with what they print and draw: `python docs/site/notebook_pages.py` runs them.

The notebooks in the repository have no outputs. Executed copies are kept in temp_data/notebooks, and made anew when the
code of their cells changes; delete a copy after a change of the project that it should show. Graphs and samples need
the run `debug`: without it, those two notebooks are shown as code.
"""

import base64
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from myllm.paths import temp_data

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
NEED_RUN = {"metric_graphs", "hf_sampling"}
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
COLOR = re.compile(r"\x1b\[[\d;]*m")
MAX_OUTPUT_CHARS = 6_000


def main() -> None:
    missing = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if _outputs(path) is None]
    has_run = not missing or not subprocess.run([sys.executable, "-m", "myllm", "status", "debug"], **QUIET).returncode
    for path in missing:
        if path.stem in NEED_RUN and not has_run:
            print(f"{path.name}: shown as code, since it needs the run debug: ./run_pre_training_e2e_debug.sh")
        else:
            print(f"executing {path.name}", flush=True)
            execute(path)


def execute(path: Path) -> None:
    """Run a notebook and keep its copy.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook, folder = nbformat.read(path, as_version=4), NOTEBOOKS
    with tempfile.TemporaryDirectory() as exported:
        if path.stem == "hf_sampling":  # it reads the README's folder `exported`
            folder = Path(exported)
            words = ["export", "debug", "--to", str(folder / "exported")]
            subprocess.run([sys.executable, "-m", "myllm", *words], check=True, **QUIET)
        client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute()
    _copy(path).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, _copy(path))


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their file names."""
    outputs, pictures, parts = _outputs(path), {}, []
    for index, cell in enumerate(_cells(path)):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            for output in _joined(outputs[index]) if outputs else ():
                name = f"{path.stem}_{len(pictures)}.png"
                text, picture = _output(output, name)
                parts.append(text)
                pictures |= {name: picture} if picture else {}
    shown = "to run it" if outputs else "to run it and to see its figures"
    parts.insert(1, f"*Open `notebooks/{path.name}` in Jupyter {shown}.*")
    return "\n\n".join(parts), pictures


def _joined(outputs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Lines that a cell printed one after the other are one output."""
    for name, group in itertools.groupby(outputs, key=lambda output: output.get("name")):
        if name == "stdout":
            yield {"text": ["".join(output["text"]) for output in group]}
        elif name != "stderr":  # warnings are of the machine, not of the notebook
            yield from group


def _output(output: dict[str, Any], picture_name: str) -> tuple[str, bytes | None]:
    """One output as Markdown, and its picture."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![drawn by the cell above]({picture_name})", base64.b64decode("".join(data["image/png"]))
    for kind in ("text/markdown", "text/html"):
        if kind in data:
            return "".join(data[kind]), None
    text = COLOR.sub("", "".join(output.get("text", data.get("text/plain", "")))).rstrip()
    cut = text if len(text) <= MAX_OUTPUT_CHARS else f"{text[:MAX_OUTPUT_CHARS]}\n..."
    return f"~~~~{{.text .output}}\n{cut}\n~~~~" if cut else "", None


def _outputs(path: Path) -> dict[int, list[dict[str, Any]]] | None:
    """The outputs of the executed copy by the index of the cell; None if there is none of this code."""
    if not _copy(path).is_file():
        return None
    ours, executed = list(_code(path)), list(_code(_copy(path)))
    if [source for _, source, _ in ours] != [source for _, source, _ in executed]:
        return None
    return {index: outputs for (index, _, _), (_, _, outputs) in zip(ours, executed, strict=True)}


def _code(path: Path) -> Iterator[tuple[int, str, list[dict[str, Any]]]]:
    """Index, source and outputs of each cell of code."""
    for index, cell in enumerate(_cells(path)):
        if cell["cell_type"] == "code":
            yield index, "".join(cell["source"]), cell["outputs"]


def _cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _copy(path: Path) -> Path:
    return temp_data() / "notebooks" / path.name


if __name__ == "__main__":
    main()
