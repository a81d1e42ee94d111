"""The house rules of docs/design.md, read from the syntax tree: purity, names and sizes."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "myllm"
FILES = sorted(PACKAGE.rglob("*.py"))
ENTRY_POINT = ROOT / "pretrain.py"

by_file = pytest.mark.parametrize("file", [*FILES, ENTRY_POINT], ids=lambda file: str(file.relative_to(ROOT)))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module_name(file: Path) -> str:
    """`myllm.data.dataset` for src/myllm/data/shards.py."""
    if file == ENTRY_POINT:
        return "myllm.pretrain"
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(file: Path) -> Iterator[str]:
    """Full names of everything a file imports, inside functions too."""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            yield base
            # `from . import plan` imports a module, `from .plan import describe` a name of it.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_imports_are_seen():
    """The reader of imports itself: relative, absolute, whole modules, and those inside functions."""
    assert "myllm.planning.batch" in set(imported_modules(PACKAGE / "training/setup.py"))  # from a package
    assert "myllm.config" in set(imported_modules(PACKAGE / "model/norm.py"))  # from myllm.config import ModelConfig
    assert "myllm.inference.load" in set(imported_modules(PACKAGE / "cli/sample.py"))  # inside a function
    assert "myllm.training.loop" in set(imported_modules(ENTRY_POINT))  # from myllm.training.loop import train


def test_no_import_cycles():
    graph = {}
    for file in FILES:
        name = module_name(file)
        known = {module_name(other) for other in FILES} - {"myllm", name}
        # A package's own __init__ is imported with each of its modules; it may name them.
        graph[name] = {other for other in imported_modules(file) if other in known and not name.startswith(f"{other}.")}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


@by_file
def test_the_environment_is_read_in_few_places(file):
    if file.name in ("launcher.py", "paths.py", "library_env.py"):
        return
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in ("environ", "getenv", "environb", "putenv"), f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "getenv"}, f"line {node.lineno}"


def is_type_alias(node: ast.expr) -> bool:
    """`list[int]`, `A | B`, or a name taken from elsewhere, such as `Positional = tyro.conf.Positional`."""
    return isinstance(node, ast.Subscript | ast.BinOp | ast.Attribute)


@by_file
def test_no_module_holds_state(file):
    """Only constants, in capitals, and type aliases stand at the top of a module; nothing rebinds one."""
    for node in tree(file).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in filter(None, targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign), f"line {node.lineno}"
            for name in [each.id for each in ast.walk(target) if isinstance(each, ast.Name)]:
                constant = name.strip("_").isupper() or name in ("__all__", "__version__")
                alias = re.fullmatch(r"_?[A-Z][a-zA-Z]+", name) and is_type_alias(node.value)
                assert constant or alias, f"{name} on line {node.lineno} is no constant"
            assert isinstance(target, ast.Name | ast.Tuple), f"line {node.lineno} sets a part of something"
    assert not [node.lineno for node in ast.walk(tree(file)) if isinstance(node, ast.Global)]


@by_file
def test_imports_do_no_work(file):
    """At the top stand definitions alone; calls only as constants' values, and no loops."""
    for node in tree(file).body:
        if isinstance(node, ast.Expr):
            # A docstring, or pretrain.py finding the package of a bare checkout.
            assert isinstance(node.value, ast.Constant) or file == ENTRY_POINT, f"line {node.lineno}"
        elif isinstance(node, ast.If):
            assert "__name__" in ast.unparse(node.test) or "TYPE_CHECKING" in ast.unparse(node.test)
        else:
            allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
            assert isinstance(node, allowed), f"line {node.lineno}"


@by_file
def test_names_say_what_things_are(file):
    forbidden = re.compile(r"(utils?|managers?|handlers?|helpers?)$", re.IGNORECASE)
    assert not forbidden.search(file.stem)
    assert not forbidden.search(file.parent.name)
    names = [node.name for node in ast.walk(tree(file)) if isinstance(node, ast.ClassDef)]
    assert not [name for name in names if forbidden.search(name)]


@by_file
def test_everything_public_is_said_in_a_docstring(file):
    assert ast.get_docstring(tree(file)), "the module"
    for node in tree(file).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            # A dataclass whose fields say it all may go without.
            assert ast.get_docstring(node) or node.decorator_list, node.name


@pytest.mark.parametrize("part", ["model", "optim", "data"])
def test_parts_know_no_ranks(part):
    for file in (PACKAGE / part).rglob("*.py"):
        if file.name == "dataloader.py":  # ranks wait together for a data set that is still growing
            continue
        for name in imported_modules(file):
            assert not name.startswith(("torch.distributed", "myllm.distributed.collectives")), (
                f"{file.name} imports {name}"
            )


@by_file
def test_sizes(file):
    lines = file.read_text(encoding="utf-8").count("\n")
    assert lines <= 400
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"


def test_preparing_data_needs_no_torch():
    """Each worker process imports these; torch would cost every one of them seconds and memory."""
    modules = ("prepare.prepare", "prepare.background", "sources.source", "tokenizer.load", "dataset", "sampler")
    code = f"""
import sys
import myllm.cli.main  # what `myllm data prepare` starts its workers with
{"".join(f"import myllm.data.{name}{chr(10)}" for name in modules)}
print([name for name in ("torch", "transformers", "matplotlib", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (
            ("myllm.training.loop",),
            ("matplotlib", "myllm.training.preflight", "myllm.training.anomaly", "myllm.runs.report", "myllm.hub"),
        ),
        (
            (
                "pretrain",
                "myllm.training.preflight.rehearsal",
                "myllm.hub.background_publish",
                "myllm.hub.export.transformers",
            ),
            ("matplotlib", "tkinter", "IPython"),
        ),
    ],
)
def test_training_loads_only_what_it_needs(modules: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    """Every rank would load it."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import {", ".join(modules)}
print([name for name in sys.modules if name.startswith({forbidden})])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_training_never_imports_a_peer():
    """transformers is there to be compared with, which exports do."""
    for file in FILES:
        names = set(imported_modules(file))
        peers = {"lm_eval", "pytest", "hypothesis"} | (set() if file.parent.name == "export" else {"transformers"})
        assert not {name.split(".")[0] for name in names} & peers, file.name


def test_what_training_calls_comes_with_its_kernels():
    """Compiled under other settings than it runs with, a step is compiled twice: only `fast_kernels` may `wrap`."""
    for file in (*FILES, *(ROOT / "benchmarks").rglob("*.py")):
        if file.name != "kernels.py":
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"(parallel\.|import .*)\bwrap\b", text.replace("textwrap", "")), file.name
