"""The package as `pip install` of a wheel leaves it: no checkout around it, and every file it reads inside."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with myllm as installed from a wheel that was built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE.txt"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "environment.sh")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)],
        check=True, timeout=240, env=os.environ | {"PIP_USER": "0"},
    )  # fmt: skip
    return target


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # -P: not the current folder's modules. The checkout is installed in this environment too; the wheel comes first.
    return subprocess.run(
        [sys.executable, "-P", *words], env={**os.environ, "PYTHONPATH": str(installed)}, cwd=folder,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_wheel_contains_all_package_files(installed: Path) -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "src/myllm"], capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.split("\0") if name and not name.endswith("README.md")]
    expected = {name.removeprefix("src/") for name in names if (ROOT / name).exists()}
    there = {str(path.relative_to(installed)) for path in installed.glob("myllm/**/*") if path.is_file()}
    assert expected <= there


def test_installed_package_tokenizes_and_uses_current_folder(installed: Path, tmp_path: Path) -> None:
    script = """
import myllm
from myllm import paths
from myllm.data.tokenizer.load import load_tokenizer
print(myllm.__file__)
print(load_tokenizer().decode(load_tokenizer().encode("Hello, world")))
print(paths.temp_data())
"""
    environment = {name: value for name, value in os.environ.items() if name != "MYLLM_DATA"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment | {"PYTHONPATH": str(installed)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    module, text, data = done.stdout.splitlines()
    assert Path(module).is_relative_to(installed)
    assert text == "Hello, world"
    assert Path(data) == tmp_path / "temp_data"


def test_installed_package_reports_clone_only_command(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-m", "myllm", "prove-resume")
    assert done.returncode == 2
    assert "clone of the repository" in done.stderr
    assert done.stderr.count("\n") == 1
