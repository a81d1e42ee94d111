"""The house rules that no linter checks. Ruff and import-linter check the rest (pyproject.toml, `make lint`)."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "src" / "myllm"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_PACKAGES, MAX_TOP_MODULES, MAX_FILES_PER_FOLDER = 12, 9, 15
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
MAX_CORE_LINES = 2_500
ADVICE = "put it into a function"
LATER = "import it inside the function that uses it, or under TYPE_CHECKING"


@cache
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in [*FILES, ROOT / "pretrain.py"]}


def place(file: Path, node: ast.stmt | ast.expr) -> str:
    return f"{file.relative_to(ROOT)}:{node.lineno}"


def test_package_and_folder_counts() -> None:
    folders = [PACKAGE, *(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)]
    packages = [folder for folder in folders if folder.parent == PACKAGE]
    assert len(packages) <= MAX_PACKAGES, "put the new package into one of the others"
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_TOP_MODULES, "put the new module into a package"
    crowded = {
        str(folder.relative_to(ROOT)): len(files)
        for folder in folders
        if len(files := [path for path in folder.iterdir() if path.is_file()]) > MAX_FILES_PER_FOLDER
    }
    assert not crowded, f"at most {MAX_FILES_PER_FOLDER} files: merge two, or move some into a package inside"


def test_file_and_function_lengths() -> None:
    long_files = [str(f.relative_to(ROOT)) for f in FILES if f.read_text(encoding="utf-8").count("\n") > MAX_FILE_LINES]
    long_functions = [
        f"{place(file, node)} {node.name}"
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long_files, f"at most {MAX_FILE_LINES} lines: split them by subject"
    assert not long_functions, f"at most {MAX_FUNCTION_LINES} lines: split them into steps that have names"


def test_core_length() -> None:
    """README.md lists it in reading order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    core = re.findall(r"^\| \[`(src/myllm/[\w/]+\.py)`\]", readme, re.M)
    assert 15 <= len(core) <= 25
    lengths = {name: (ROOT / name).read_text(encoding="utf-8").count("\n") for name in core}
    assert sum(lengths.values()) <= MAX_CORE_LINES, f"shorten one of these, or move a subject out of it: {lengths}"


def test_package_init_is_docstring_only() -> None:
    """An __init__ is a docstring of at most twelve lines, and imports nothing."""
    for file in PACKAGE.glob("*/**/__init__.py"):
        first, *others = trees()[file].body
        assert isinstance(first, ast.Expr), f"{file} has no docstring"
        assert not others, f"{place(file, others[0])}: move it to a module; importers name the module"
        assert first.end_lineno <= 12, f"{file}: at most twelve lines; details belong in the package's README.md"


def is_constant_or_type_alias(name: str, value: ast.expr | None) -> bool:
    is_constant = name.strip("_").isupper() or name in ("__all__", "__version__")
    # `list[int]`, `A | B`, or a name taken from elsewhere, such as `Positional = tyro.conf.Positional`
    is_alias = re.fullmatch(r"_?[A-Z]\w*", name) and isinstance(value, ast.Subscript | ast.BinOp | ast.Attribute)
    return bool(is_constant or is_alias)


def test_modules_contain_only_definitions() -> None:
    """At the top of a module are definitions, constants and type aliases only."""
    definitions = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    for file, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.Expr):
                # A docstring, or pretrain.py finding the package of a bare checkout.
                is_docstring = isinstance(node.value, ast.Constant)
                assert is_docstring or file.parent == ROOT, f"{place(file, node)} does work at import: {ADVICE}"
            elif isinstance(node, ast.If):
                expected = re.search("__name__|TYPE_CHECKING", ast.unparse(node.test))
                assert expected, f"{place(file, node)} decides at import: {ADVICE}"
            else:
                assert isinstance(node, definitions), f"{place(file, node)} does work at import: {ADVICE}"
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [name for target in targets for name in ast.walk(target)]
                for name in names:
                    if isinstance(name, ast.Name):
                        is_fixed = is_constant_or_type_alias(name.id, node.value)
                        assert is_fixed, f"{place(file, node)}: name a constant {name.id.upper()}; no module has state"


def test_names_are_not_vague() -> None:
    vague = re.compile(r"(utils?|managers?|handlers?|helpers?)$", re.IGNORECASE)
    private = re.compile(r"(each|what|made|asked|written)$")
    for file, tree in trees().items():
        assert not vague.search(file.stem), f"{file}: name what it does"
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert not vague.search(node.name), f"{place(file, node)} class {node.name}: name what it does"
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assert not private.fullmatch(node.id), f"{place(file, node)} names {node.id!r}: name the element"


def modules_loaded(code: str) -> set[str]:
    """What a new interpreter has loaded after `code`."""
    program = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240)
    return set(done.stdout.split())


def test_data_preparation_does_not_import_torch() -> None:
    """Each worker process would lose seconds and memory to it."""
    loaded = modules_loaded("import myllm.cli.main, myllm.cli.data, myllm.data.prepare.background, myllm.data.sampler")
    assert not loaded & {"torch", "transformers", "matplotlib", "datasets"}, LATER


def test_training_imports_are_minimal() -> None:
    """Reports and publishing come after the end; a rehearsal before the beginning; a dump only with bad numbers."""
    loaded = modules_loaded("import pretrain, myllm.training.loop")
    ours = r"myllm\.(runs\.(report|trackers)|hub|training\.(preflight|anomaly))"
    late = rf"(matplotlib|tkinter|IPython|transformers|tensorboard|wandb|{ours})(\.|$)"
    assert not [name for name in loaded if re.match(late, name)], LATER


def test_only_kernels_module_compiles_steps() -> None:
    """Compiled under other settings than it runs with, a step is compiled twice: only `kernels.py` may do it."""
    for file in (*FILES, *(ROOT / "benchmarks").rglob("*.py")):
        if file.name not in ("kernels.py", "parallelize.py"):
            text = file.read_text(encoding="utf-8")
            imported = re.search(r"parallelize import .*\b(wrap|parallelize)\b", text)
            assert not imported, f"{file} compiles: call fast_kernels of training/kernels.py instead"
