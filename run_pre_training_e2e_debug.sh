#!/usr/bin/env bash
# run_pre_training_e2e.sh with the debug preset: the whole path in one process, with no GPU and no downloaded data.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # `sh run_...sh`: everything below is bash's
set -euo pipefail

for argument in "$@"; do
  case "$argument" in -h | --help)
    cat <<'USAGE'
Usage: ./run_pre_training_e2e_debug.sh [OVERRIDE...]

Runs everything that run_pre_training_e2e.sh does, on a tiny model and text that every Python brings along: minutes,
no GPU, no download of data.
OVERRIDE is handed to pretrain.py, such as --name my-run or --train.max-steps 50.
USAGE
    exit
    ;;
  esac
done

script="${BASH_SOURCE[0]}"
while [ -L "$script" ]; do # a link to this script, such as one in ~/bin
  target="$(readlink "$script")"
  case "$target" in /*) script="$target" ;; *) script="$(dirname "$script")/$target" ;; esac
done
here="$(unset CDPATH && cd "$(dirname "$script")" && pwd)"
exec "$here/run_pre_training_e2e.sh" --force debug "$@"
