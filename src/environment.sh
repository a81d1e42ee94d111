#!/usr/bin/env bash
# Finds or makes the Python environment, installs what is missing, and prints the path of its Python, nothing else:
#
#     PYTHON="$(src/environment.sh [--dev] [--replace-torch])"
#
# Uses the active virtual or conda environment, else .venv in the repository. Keeps an installed torch that is in
# pyproject.toml's range: on a GPU machine it is the one that fits the driver. Replaces one out of range only in .venv,
# or with --replace-torch. --dev adds what the tests need. Downloads nothing when nothing is missing. Installs with uv
# if it is installed, else with pip. Runs on macOS's bash 3.2 too. environment.py knows what is missing.
set -euo pipefail
exec 3>&1 1>&2 # stdout is for the answer alone

say() { printf '%s\n' "$*"; }
fail() { say "environment: $2" && exit "$1"; }

dev="" replace_torch=""
for argument in "$@"; do
  case "$argument" in
    --dev) dev=--dev ;;
    --replace-torch) replace_torch=yes ;;
    *) fail 2 "usage: src/environment.sh [--dev] [--replace-torch]" ;;
  esac
done
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$(pwd -P)"
# GPU images pin their own versions through PIP_CONSTRAINT, against ours; clusters set PIP_USER, which a venv refuses.
unset PIP_CONSTRAINT
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1

minimum="$(sed -n 's/^requires-python = ">=\(.*\)"$/\1/p' pyproject.toml)"
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < tuple(map(int, sys.argv[1].split("."))))' "$minimum"; }
examine() { "$1" "$root/src/environment.py" "${@:2}" ${dev:+"$dev"}; }

choose_python() { # sets $python. Conda's base environment belongs to nobody, and counts as a system Python.
  local prefix="${VIRTUAL_ENV:-}"
  if [ -z "$prefix" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then prefix="${CONDA_PREFIX:-}"; fi
  if [ -n "$prefix" ] && [ -x "$prefix/bin/python" ]; then
    new_enough "$prefix/bin/python" || fail 2 "the active environment $prefix has
$("$prefix/bin/python" --version 2>&1), and MyLLM needs Python $minimum or newer. Deactivate it to use .venv instead."
  else
    # GPU images put the Python of a virtual environment on PATH without activating it.
    prefix="$(python3 -c 'import os, sys
fits = sys.prefix != sys.base_prefix and sys.version_info >= tuple(map(int, sys.argv[1].split(".")))
print(sys.prefix if fits and os.access(sys.prefix, os.W_OK) else "")' "$minimum" 2>/dev/null || true)"
  fi
  python="${prefix:-$root/.venv}/bin/python"
}

usable() { # a .venv that was moved still runs, but its scripts name the old folder
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
  local candidate base="" options=""
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && new_enough "$candidate" 2>/dev/null; then base="$candidate" && break; fi
  done
  [ -n "$base" ] || fail 2 "MyLLM needs Python $minimum or newer; python3 here is: $(python3 --version 2>&1 || true).
Install a newer one (package manager, python.org, or: uv python install 3.12) and run this again."
  if [ -n "$(examine "$base" torch)" ]; then options="--system-site-packages"; fi
  say "Making $root/.venv with $("$base" --version)"
  rm -rf .venv && "$base" -m venv ${options:+"$options"} "$root/.venv" && return
  # Debian's Python comes without ensurepip, which uv does not need; --seed: with pip, as the README's commands expect.
  rm -rf .venv && command -v uv >/dev/null &&
    uv venv --seed --python "$base" ${options:+"$options"} "$root/.venv" && return
  rm -rf .venv
  fail 2 "$base cannot make a virtual environment. On Debian and Ubuntu an administrator installs what is missing:
apt install $("$base" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'). Or install uv, or activate a conda environment; then run this again."
}

install() { # pip also reads pip.conf, which may name the only index that this machine can reach
  if command -v uv >/dev/null && uv pip install --python "$python" "$@"; then return; fi
  "$python" -c 'import pip' 2>/dev/null || "$python" -m ensurepip
  "$python" -m pip install "$@" || fail 1 "installing into $python failed, see above. Run this again to continue."
}

install_missing() { # $lock is a folder to work in
  local stamp foreign
  foreign="$(examine "$python" plan "$lock")"
  if [ -n "$foreign" ] && [ -z "$replace_torch" ] && [ "$python" != "$root/.venv/bin/python" ]; then
    fail 2 "the active environment ${python%/bin/python} has torch $foreign, and MyLLM needs torch$(
      sed -n 's/^ *"torch\([<>=].*,.*\)",$/\1/p' pyproject.toml
    ).
Nothing was changed. Deactivate it to use .venv instead, or replace its torch: src/environment.sh --replace-torch"
  fi
  stamp="$(cat "$lock/stamp.txt")"
  rm -f "$(dirname "$stamp")"/.myllm-*
  if [ -s "$lock/torch.txt" ]; then
    say "Installing $(cat "$lock/torch.txt"), a large download"
    install -r "$lock/torch.txt"
  fi
  say "Installing the other packages into $python, with $(cat "$lock/constraints.txt")"
  install -q -c "$lock/constraints.txt" -r "$lock/rest.txt"
  install -q --no-deps -e "$root"
  : >"$stamp"
  ready || fail 1 "$python still lacks:
$(examine "$python" missing)
If it is in .venv: delete .venv and run this again."
}

take_lock() { # nodes that share a disk start together; making a folder is atomic on network disks too
  local owner told=""
  lock="$root/.venv.lock"
  until mkdir "$lock" 2>/dev/null; do
    [ -w "$root" ] || fail 1 "cannot write to $root"
    owner="$(cat "$lock/owner" 2>/dev/null || true)" # host, process
    if [ "${owner% *}" = "$HOSTNAME" ] && ! kill -0 "${owner#* }" 2>/dev/null; then
      # Left behind by a process that was killed. Whoever moves its name away removes the lock: with another name in it,
      # it is that of one who was faster.
      if mv "$lock/owner" "$lock/dead.$$" 2>/dev/null; then
        if [ "$(cat "$lock/dead.$$")" = "$owner" ]; then rm -rf "$lock" && continue; fi
        mv "$lock/dead.$$" "$lock/owner" || true
      fi
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
