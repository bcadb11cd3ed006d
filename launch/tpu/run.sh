#!/usr/bin/env bash
# Runs a dqjax command on every host of a TPU VM slice, and again after each preemption, until it succeeds.
#
#   launch/tpu/run.sh --name my-v5p --zone us-east5-a -- \
#       python -m dqjax.train --config configs/sft/qwen2.5-7b-v5p.yaml train.run_dir=/mnt/runs/7b
#
#   --name, --zone, --project   of the TPU VM; a queued resource keeps the name when it comes back
#   --repo URL                  what the hosts clone (default: this checkout's origin), at --ref (default: this commit)
#   --restarts N                attempts after the first (default 100)
#   --dry-run                   print the commands and run nothing
#
# The run folder must be on a disk that all hosts share (Filestore, or a bucket mounted by gcsfuse): the same command goes
# on from its newest checkpoint.
# jax finds the other hosts by itself on a TPU VM. Exit codes: 0 done; 2 a bad config, which no restart mends.
set -euo pipefail

name= zone= project= restarts=100 dry=false
repo=$(git config --get remote.origin.url || true) ref=$(git rev-parse HEAD 2>/dev/null || true)
while [ $# -gt 0 ]; do
    case $1 in
    --name) name=$2; shift 2 ;;
    --zone) zone=$2; shift 2 ;;
    --project) project=$2; shift 2 ;;
    --repo) repo=$2; shift 2 ;;
    --ref) ref=$2; shift 2 ;;
    --restarts) restarts=$2; shift 2 ;;
    --dry-run) dry=true; shift ;;
    --) shift; break ;;
    *) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    esac
done
for needed in name zone repo ref; do
    [ -n "${!needed}" ] || { echo "--$needed is missing; see the head of $0" >&2; exit 2; }
done
[ $# -gt 0 ] || { echo "no command behind --; see the head of $0" >&2; exit 2; }

flags=(--zone "$zone")
[ -z "$project" ] || flags+=(--project "$project")

run() { if $dry; then printf '%q ' "$@"; echo; else "$@"; fi; }
on_all_hosts() { run gcloud compute tpus tpu-vm ssh "$name" "${flags[@]}" --worker=all --command "$1"; }

setup="test -d dqjax || git clone $(printf %q "$repo") dqjax
cd dqjax && git fetch --quiet && git checkout --quiet $ref
test -x .venv/bin/python || python3 -m venv .venv
.venv/bin/python -m pip install --quiet -e '.[tpu]'"
command="cd dqjax && PATH=\$PWD/.venv/bin:\$PATH $(printf '%q ' "$@")"

for ((attempt = 0; attempt <= restarts; attempt++)); do
    status=0
    on_all_hosts "$setup" && on_all_hosts "$command" || status=$?
    [ $status -ne 0 ] || exit 0
    [ $status -ne 2 ] || { echo "the command refused its config or input; not restarted" >&2; exit 2; }
    echo "attempt $((attempt + 1)) ended with status $status; again in 60 s" >&2
    sleep 60 # a preempted slice needs time to come back under its name
done
echo "gave up after $restarts restarts" >&2
exit 1
