#!/usr/bin/env bash
#SBATCH --job-name=dqjax-data
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --open-mode=append
# One data stage over a SLURM array: task i of n does shard i/n. What is answered is on disk, so a requeued task goes on.
#
#   sbatch --array=0-15 launch/slurm/stage.sh generate --config configs/data/mine.yaml
#   python -m dqjax.data merge runs/factory/generate.jsonl          when all tasks are done
#
# Submit from the root of the repository, on a disk that all nodes share; DQJAX_ENV is a virtual environment other than .venv.
set -euo pipefail
[ -n "${SLURM_ARRAY_TASK_COUNT:-}" ] || { echo "not in an array: sbatch --array=0-15 $0 STAGE --config FILE" >&2; exit 2; }
[ $# -gt 0 ] || { echo "no stage; see the head of $0" >&2; exit 2; }
export PATH="${DQJAX_ENV:-$PWD/.venv}/bin:$PATH"
exec python -m dqjax.data "$@" --shard "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT"
