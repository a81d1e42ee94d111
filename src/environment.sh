#!/usr/bin/env bash
# Finds or makes the Python environment, installs what is missing, and prints the path of its python, nothing else:
#
#     PYTHON="$(src/environment.sh [--dev] [--replace-torch])"
#
# An active virtual or conda environment is used, else .venv in the repository, which is made if need be. A torch that
# is already there and within pyproject.toml's range is kept: on a GPU machine it is the one that fits the driver.
# One that is not stays too where the environment is the user's own, unless --replace-torch is given.
# --dev adds what the tests need. Nothing is downloaded when nothing is missing. Runs on macOS's bash 3.2 too.
set -euo pipefail
exec 3>&1 1>&2 # stdout is for the answer alone

say() { printf '%s\n' "$*"; }
fail() { # STATUS MESSAGE
  say "environment: $2"
  exit "$1"
}

dev="" replace_torch=""
for argument in "$@"; do
  case "$argument" in
    --dev) dev=dev ;;
    --replace-torch) replace_torch=yes ;;
    *) fail 2 "usage: src/environment.sh [--dev] [--replace-torch]" ;;
  esac
done

unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$(pwd -P)"
minimum="$(sed -n 's/^requires-python = ">=\(.*\)"$/\1/p' pyproject.toml)"

# GPU images pin their own versions through PIP_CONSTRAINT, against ours; clusters set PIP_USER, which a venv refuses.
unset PIP_CONSTRAINT
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < tuple(map(int, sys.argv[1].split("."))))' "$minimum"; }

# examine PYTHON missing    prints what PYTHON's environment lacks, one item a line
# examine PYTHON torch      prints the version of its torch, if that is one to keep
# examine PYTHON foreign    prints the version of its torch, if that is one that another would have to replace
# examine PYTHON FOLDER     writes torch.txt, rest.txt and constraints.txt for pip, and stamp.txt: the file to leave
#                           behind in the environment when the installation is complete
examine() {
  "$1" - "$2" "$root" "$dev" <<'PYTHON'
import hashlib, operator, re, sys, tomllib
from importlib import metadata, util
from pathlib import Path

task, root, dev = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
requirements, pyproject = (root / "requirements.txt").read_text(), (root / "pyproject.toml").read_text()
project = tomllib.loads(pyproject)["project"]
PIN = re.compile(r"^([\w.-]+)==(\S+)", re.M)
runtime = dict(PIN.findall(requirements))
extra = dict(PIN.findall("\n".join(project["optional-dependencies"]["dev"]))) if dev else {}


def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(text):
    return tuple(int(number) for number in re.match(r"[\d.]*\d", text)[0].split("."))


def torch_to_keep():
    """The installed torch's version if its release (2.12.0 of 2.12.0a0+nv) is in pyproject.toml's range, else ""."""
    found = version("torch")
    if not found or util.find_spec("torch") is None:
        return ""
    bounds = next(re.findall(r"(>=|<)([\d.]+)", line) for line in project["dependencies"] if re.match(r"torch\W", line))
    compare = {">=": operator.ge, "<": operator.lt}
    return found if all(compare[sign](release(found), release(bound)) for sign, bound in bounds) else ""


def stamps():
    """Stamps that would do, the one to write first. The path is part of the key: an installation is for one folder."""
    key = hashlib.sha256("\0".join([requirements, pyproject, str(root)]).encode()).hexdigest()[:12]
    names = [f".myllm-{key}-dev"] if dev else [f".myllm-{key}", f".myllm-{key}-dev"]
    return [Path(sys.prefix) / name for name in names]


def missing():
    for name, pin in (runtime | extra).items():
        there = torch_to_keep() if name == "torch" else version(name) == pin
        # An interrupted pip can leave metadata without the package. In requirements.txt, names are module names.
        if not there or (name in runtime and util.find_spec(name) is None):
            yield f"{name}=={pin}"
    spec = util.find_spec("myllm")
    here = spec and spec.origin and Path(spec.origin).resolve().is_relative_to(root / "src")
    if not here or not (Path(sys.prefix) / "bin" / "myllm").exists():
        yield "myllm, from this folder"
    if not any(stamp.exists() for stamp in stamps()):
        yield "a completed installation"


if task == "missing":
    print("\n".join(missing()))
elif task == "torch":
    print(torch_to_keep())
elif task == "foreign":
    there = version("torch") and util.find_spec("torch") is not None
    print(version("torch") if there and not torch_to_keep() else "")
else:
    Path(task, "stamp.txt").write_text(str(stamps()[0]))
    kept = torch_to_keep()
    torch = f"torch=={kept or runtime.pop('torch')}\n"
    runtime.pop("torch", None)
    Path(task, "constraints.txt").write_text(torch)
    Path(task, "torch.txt").write_text("" if kept else torch)
    Path(task, "rest.txt").write_text("".join(f"{name}=={pin}\n" for name, pin in (runtime | extra).items()))
PYTHON
}

# Sets $python. An active environment is its owner's choice; conda's base is nobody's, and counts as a system python.
choose_python() {
  local prefix="${VIRTUAL_ENV:-}"
  if [ -z "$prefix" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then prefix="${CONDA_PREFIX:-}"; fi
  if [ -n "$prefix" ] && [ -x "$prefix/bin/python" ]; then
    new_enough "$prefix/bin/python" || fail 2 "the active environment $prefix has
$("$prefix/bin/python" --version 2>&1), and MyLLM needs Python $minimum or newer.
Deactivate it, and a fitting one is made in .venv."
    python="$prefix/bin/python"
    return
  fi
  # GPU images put the python of a virtual environment on PATH without activating it.
  prefix="$(python3 -c 'import os, sys
fits = sys.prefix != sys.base_prefix and sys.version_info >= tuple(map(int, sys.argv[1].split(".")))
print(sys.prefix if fits and os.access(sys.prefix, os.W_OK) else "")' "$minimum" 2>/dev/null || true)"
  python="${prefix:-$root/.venv}/bin/python"
}

# Whether $python runs. One in a .venv that was moved or copied does, but its scripts name the old folder's python.
usable() {
  local made_in
  [ -x "$python" ] && new_enough "$python" || return 1
  [ "$python" = "$root/.venv/bin/python" ] || return 0
  made_in="$(sed -n 's/^command = .* -m venv \(--[^ ]* \)*//p' .venv/pyvenv.cfg)"
  [ -z "$made_in" ] || [ "$made_in" -ef "$root/.venv" ]
}

ready() {
  local missing
  usable && missing="$(examine "$python" missing)" && [ -z "$missing" ]
}

make_venv() {
  local candidate package base="" options=""
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && new_enough "$candidate" 2>/dev/null; then
      base="$candidate"
      break
    fi
  done
  [ -n "$base" ] || fail 2 "MyLLM needs Python $minimum or newer; python3 here is: $(python3 --version 2>&1 || true).
Put a newer one on PATH (from your package manager, python.org, or: uv python install 3.12) and run this again."
  if [ -n "$(examine "$base" torch)" ]; then options="--system-site-packages"; fi
  [ ! -e .venv ] || say "Replacing .venv: its folder was moved, or its Python is gone or too old"
  say "Making $root/.venv with $("$base" --version)"
  rm -rf .venv
  "$base" -m venv ${options:+"$options"} "$root/.venv" && return
  rm -rf .venv
  # Debian's python comes without ensurepip. uv needs no administrator to do without it.
  command -v uv >/dev/null && uv venv --python "$base" ${options:+"$options"} "$root/.venv" && return
  rm -rf .venv
  package="$("$base" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  fail 2 "$base cannot make a virtual environment. On Debian and Ubuntu an administrator installs what is missing:
apt install $package. Without an administrator: install uv, or activate a conda environment; then run this again."
}

install() {
  if "$python" -c 'import pip' 2>/dev/null; then
    "$python" -m pip install "$@"
  elif command -v uv >/dev/null; then
    uv pip install --python "$python" "$@"
  else
    "$python" -m ensurepip && "$python" -m pip install "$@"
  fi || fail 1 "installing into $python failed, see above. Run this again to go on from there."
}

install_missing() { # $lock is a folder to work in
  local stamp foreign
  foreign="$(examine "$python" foreign)"
  if [ -n "$foreign" ] && [ -z "$replace_torch" ] && [ "$python" != "$root/.venv/bin/python" ]; then
    fail 2 "the active environment ${python%/bin/python} has torch $foreign, and MyLLM needs torch$(
      sed -n 's/^ *"torch\(.*\)",$/\1/p' pyproject.toml
    ).
Nothing was changed. Deactivate it, and a fitting one is made in .venv; or have its torch replaced:
  src/environment.sh --replace-torch"
  fi
  examine "$python" "$lock"
  stamp="$(cat "$lock/stamp.txt")"
  rm -f "$(dirname "$stamp")"/.myllm-*
  if [ -s "$lock/torch.txt" ]; then
    say "Installing $(cat "$lock/torch.txt"), a large download"
    install -r "$lock/torch.txt"
  else
    say "Keeping the $(cat "$lock/constraints.txt") that is there"
  fi
  say "Installing the other packages into $python"
  install -q -c "$lock/constraints.txt" -r "$lock/rest.txt"
  install -q --no-deps -e "$root"
  : >"$stamp"
  ready || fail 1 "$python still lacks:
$(examine "$python" missing)
If it is in .venv: delete .venv and run this again."
}

# Nodes that share a disk start together. A folder, because making one is atomic on network disks too.
take_lock() {
  local owner told=""
  lock="$root/.venv.lock"
  until mkdir "$lock" 2>/dev/null; do
    [ -w "$root" ] || fail 1 "cannot write to $root"
    owner="$(cat "$lock/owner" 2>/dev/null || true)" # host, process
    if [ "${owner% *}" = "$HOSTNAME" ] && ! kill -0 "${owner#* }" 2>/dev/null; then
      rm -rf "$lock" # left behind by a process that was killed
      continue
    fi
    [ -n "$told" ] || say "Waiting for another installation (${owner:-a new process}); if there is none, delete $lock"
    told=yes
    sleep 1
  done
  trap 'rm -rf "$lock"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  printf '%s %s\n' "$HOSTNAME" "$$" >"$lock/owner"
}

choose_python
if ! ready; then
  take_lock
  if ! ready; then # another process may have finished meanwhile
    usable || make_venv
    install_missing
  fi
fi
printf '%s\n' "$python" >&3
