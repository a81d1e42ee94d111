"""What the Python that runs this lacks. Called by environment.sh with any Python 3.11+, before anything is installed.

environment.py missing [--dev]          print what the environment lacks, one item a line
environment.py torch                    print the version of its torch, if it is in pyproject.toml's range
environment.py plan FOLDER [--dev]      write torch.txt, rest.txt and constraints.txt for pip into FOLDER, and
                                        stamp.txt, the file to create when the installation is complete;
                                        print the version of a torch that would have to be replaced
"""

import hashlib
import operator
import re
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS, PYPROJECT = (ROOT / "requirements.txt").read_text(), (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)["project"]
PIN = re.compile(r"^([\w.-]+)==(\S+)", re.M)


def installed(name: str) -> str | None:
    """The version; None also if only metadata is left. The names in requirements.txt are module names too."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def usable_torch() -> str:
    """The version of the installed torch, if its release (2.12.0 of 2.12.0a0+nv) is in range, else ""."""

    def release(version: str) -> tuple[int, ...]:
        return tuple(int(number) for number in re.match(r"[\d.]*\d", version)[0].split("."))

    version = installed("torch") if util.find_spec("torch") else None
    bounds = next(re.findall(r"(>=|<)([\d.]+)", line) for line in PROJECT["dependencies"] if re.match(r"torch\W", line))
    compare = {">=": operator.ge, "<": operator.lt}
    in_range = version and all(compare[sign](release(version), release(bound)) for sign, bound in bounds)
    return version if in_range else ""


def stamps(dev: bool) -> list[Path]:
    """Any of these proves a complete installation. The path is part of the key: an installation is for one folder."""
    key = hashlib.sha256("\0".join([REQUIREMENTS, PYPROJECT, str(ROOT)]).encode()).hexdigest()[:12]
    return [Path(sys.prefix, f".myllm-{key}{suffix}") for suffix in (["-dev"] if dev else ["", "-dev"])]


def main(task: str, *words: str) -> None:
    dev = "--dev" in words
    runtime = dict(PIN.findall(REQUIREMENTS))
    extras = PROJECT["optional-dependencies"]
    extra = dict(PIN.findall("\n".join(extras["dev"] + extras["docs"]))) if dev else {}
    torch = usable_torch()
    if task == "torch":
        print(torch)
    elif task == "missing":
        for name, pin in (runtime | extra).items():
            found = torch if name == "torch" else installed(name) == pin
            if not found or (name in runtime and util.find_spec(name) is None):
                print(f"{name}=={pin}")
        spec = util.find_spec("myllm")
        in_place = spec and spec.origin and Path(spec.origin).resolve().is_relative_to(ROOT / "src")
        if not in_place or not Path(sys.prefix, "bin", "myllm").exists():
            print("myllm, from this folder")
        if not any(stamp.exists() for stamp in stamps(dev)):
            print("a complete installation")
    elif task == "plan":
        folder, pin = Path(words[0]), runtime.pop("torch")
        files = {
            "torch.txt": "" if torch else f"torch=={pin}\n",
            "constraints.txt": f"torch=={torch or pin}\n",
            "rest.txt": "".join(f"{name}=={version}\n" for name, version in (runtime | extra).items()),
            "stamp.txt": str(stamps(dev)[0]),
        }
        for name, text in files.items():
            (folder / name).write_text(text)
        if not torch and util.find_spec("torch"):
            print(installed("torch") or "")


if __name__ == "__main__":
    sys.path.pop(0)  # this folder holds myllm, installed or not
    main(*sys.argv[1:])
