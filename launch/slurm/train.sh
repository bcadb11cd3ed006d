#!/usr/bin/env bash
#SBATCH --job-name=dqjax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
# A dqjax command on GPU nodes, one process a GPU; jax finds the others through SLURM. Preempted or out of time, it saves
# and goes back into the queue; the same command goes on from its newest checkpoint.
#
#   sbatch --nodes=2 launch/slurm/train.sh \
#       python -m dqjax.train --config configs/sft/qwen2.5-7b-v5p.yaml mesh.fsdp=16 train.run_dir=/shared/runs/7b
#
# Submit from the root of the repository, on a disk that all nodes share; DQJAX_ENV is a virtual environment other than .venv.
# Exit codes: 0 done; 2 a bad config, which no restart mends.
set -uo pipefail
[ $# -gt 0 ] || { echo "no command; see the head of $0" >&2; exit 2; }
export PATH="${DQJAX_ENV:-$PWD/.venv}/bin:$PATH"
srun --kill-on-bad-exit=1 "$@"
status=$?
if [ $status -eq 143 ]; then # stopped by SIGTERM, and saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
