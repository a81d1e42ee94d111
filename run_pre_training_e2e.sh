#!/usr/bin/env bash
# From a fresh clone to a trained, evaluated and reported model: environment -> plan -> preflight -> data and training.
# pretrain.py is the rest of the story: it prepares the data in a process beside the training, which begins as soon as
# the first shards are there; it evaluates as it trains, writes the report, says what to type next and, with --hub.repo,
# ends with publishing.
# There is no cd in here: a file named in an override is relative to where the user stands.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # `sh run_...sh`: everything below is bash's
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: ./run_pre_training_e2e.sh [OPTION...] [PRESET] [OVERRIDE...]

Makes the Python environment, checks the plan, rehearses a few steps, evaluations and a save on made-up text, then
prepares the data and, as soon as the first shards are there, trains, evaluates and reports on every GPU of this
machine. Run it again after an interruption: it resumes.

  PRESET      what to train (default: lf-llm-269m, or what --config FILE says); the first argument, without a dash
  OVERRIDE    handed to pretrain.py, such as --name my-run or --train.max-steps 100 or --config my.json; with
              --hub.repo NAMESPACE/NAME the model is published on the Hugging Face Hub at the end
  --force     train although there is no GPU
  --dry-run   print the plan for this machine and stop; --prepare-only: make the data set and stop

  --max-hours H         do not start a run that would take longer
  --dollars-per-hour X  of all machines of the run together: say what it will cost
  --no-preflight        no rehearsal (`myllm preflight` alone does nothing else)

Examples:
  ./run_pre_training_e2e.sh
  CUDA_VISIBLE_DEVICES=0,1 ./run_pre_training_e2e.sh lf-llm-269m --name two-gpus
  NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 ./run_pre_training_e2e.sh     (NODE_RANK=1 on the other)

No GPU? ./run_pre_training_e2e_debug.sh runs all of it in minutes.
USAGE
}

heading() { printf '\n=== %s\n' "$*"; }
refuse() {
  printf '%s\n' "$*" >&2
  exit 2
}

script="${BASH_SOURCE[0]}"
while [ -L "$script" ]; do # a link to this script, such as one in ~/bin
  target="$(readlink "$script")"
  case "$target" in /*) script="$target" ;; *) script="$(dirname "$script")/$target" ;; esac
done
here="$(unset CDPATH && cd "$(dirname "$script")" && pwd)"

force="" preflight=yes bounds=() wants="" only=""
for argument in "$@"; do # takes out what is for this script and keeps the rest, in order
  shift
  if [ -n "$wants" ]; then
    bounds+=("$wants" "$argument") wants=""
    continue
  fi
  case "$argument" in
    -h | --help) usage && exit ;;
    --force) force=yes ;;
    --no-preflight) preflight="" ;;
    --max-hours | --dollars-per-hour) wants="$argument" ;;
    --max-hours=* | --dollars-per-hour=*) bounds+=("$argument") ;;
    --prepare-only | --dry-run) only="$argument" ;;
    *) set -- "$@" "$argument" ;;
  esac
done
[ -z "$wants" ] || refuse "$wants needs a number behind it."
preset=lf-llm-269m
case "${1:--}" in
  -*) for argument in "$@"; do case "$argument" in --config | --config=*) preset="" ;; esac; done ;;
  *) preset="$1" && shift ;;
esac

nodes="${NNODES:-1}"
case "$nodes" in
  *[!0-9]* | 0) refuse "NNODES is $nodes; it is the number of machines, such as 2." ;;
esac
if [ "$preset" = debug ]; then nodes=1; fi
if [ "$nodes" -gt 1 ]; then
  missing=""
  for name in NODE_RANK MASTER_ADDR MASTER_PORT; do
    [ -n "${!name:-}" ] || missing="$missing $name"
  done
  [ -z "$missing" ] || refuse "NNODES is $nodes, so every node also needs:$missing
(NODE_RANK counts the nodes from 0; MASTER_ADDR and MASTER_PORT are where the others reach node 0)."
fi
# torchrun gives these to each process. What a job scheduler left of its own would mislead a process without torchrun.
unset RANK LOCAL_RANK WORLD_SIZE

heading "Environment"
PYTHON="$("$here/src/environment.sh")"
gpus="$("$PYTHON" -c 'import sys
from myllm.distributed.device_info import cuda_device_count, cuda_problem
print(cuda_device_count())
why = None if cuda_device_count() else cuda_problem()
if why: print(f"torch cannot use the GPUs here: {why}", file=sys.stderr)')"
printf 'python: %s\nGPUs:   %s\n' "$PYTHON" "$gpus"
processes="$gpus" # on this node
if [ "$gpus" -eq 0 ] || [ "$preset" = debug ]; then processes=1; fi

if [ "$gpus" -eq 0 ] && [ -z "$force$only" ]; then
  for n_cards in 8 1; do # a small batch may not divide among eight
    status=0
    planned="$("$PYTHON" -m myllm plan ${preset:+"$preset"} "$@" --gpus "${n_cards}xA100-80" 2>&1)" || status=$?
    [ "$status" -ne 0 ] || break
  done
  if [ "$status" -ne 0 ]; then
    printf '%s\n' "$planned" >&2
    exit "$status"
  fi
  heading "Plan: ${preset:-the config file}, on $n_cards x A100"
  printf '%s\n' "$planned"
  refuse "
No GPU was found that torch can use, so nothing was started. The plan above is for $n_cards x A100; other GPUs: myllm plan --help
  The whole path in minutes, without a GPU:  $here/run_pre_training_e2e_debug.sh
  Time and memory on this machine:           add --dry-run
  Train on this machine anyway:              add --force"
fi

heading "Plan: ${preset:-the config file}"
WORLD_SIZE=$((processes * nodes)) "$PYTHON" "$here/pretrain.py" ${preset:+"$preset"} "$@" --dry-run
case "$only" in
  --dry-run) exit ;;
  --prepare-only) exec "$PYTHON" "$here/pretrain.py" ${preset:+"$preset"} "$@" --prepare-only ;;
esac

launcher() { # sets run: what starts a process for each GPU. The name keeps one meeting of the nodes from another.
  run=("$PYTHON")
  if [ "$preset" = debug ] || { [ "$gpus" -eq 0 ] && [ "$nodes" -eq 1 ]; }; then return; fi
  where=(--standalone)
  if [ "$nodes" -gt 1 ]; then
    # Node 0 is where the others meet; which node gets rank 0 is torchrun's choice.
    where=("--nnodes=$nodes" --rdzv_backend=c10d "--rdzv_id=$1" "--rdzv_endpoint=$MASTER_ADDR:$MASTER_PORT")
    where+=("--rdzv_conf=is_host=$([ "$NODE_RANK" = 0 ] && echo 1 || echo 0)")
  fi
  run+=(-m myllm.distributed.elastic "${where[@]}" "--nproc_per_node=$processes")
}

if [ -n "$preflight" ]; then
  heading "Preflight"
  launcher "${RDZV_ID:-myllm}-preflight"
  # Beside this script, which passes a signal on, even one that comes at once: in its foreground bash would first wait
  # for the end.
  trap 'kill "$(jobs -p)" || true; wait; exit 130' INT
  trap 'kill "$(jobs -p)" || true; wait; exit 143' TERM
  trap 'kill "$(jobs -p)" || true; wait; exit 129' HUP # not where it is ignored, under nohup
  "${run[@]}" -m myllm preflight ${preset:+"$preset"} "$@" ${bounds[@]+"${bounds[@]}"} &
  wait "$!" || {
    status=$?
    printf '\nNothing was started. Start it all the same with --no-preflight.\n' >&2
    exit "$status"
  }
  trap - INT TERM HUP
fi

heading "Data, training, evaluation and report"
# exec, so that a scheduler's SIGTERM reaches the training, which saves a checkpoint, and its exit status is ours.
launcher "${RDZV_ID:-myllm}"
exec "${run[@]}" "$here/pretrain.py" ${preset:+"$preset"} "$@"
