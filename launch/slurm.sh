#!/bin/bash
# Slurm: sbatch launch/slurm.sh --config configs/sit_xl2.py --workdir /shared/runs/xl2
# JAX reads number, place and coordinator of the processes from Slurm's variables.
#SBATCH --job-name=sit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8      # one process a GPU: JAX gives each the GPU of its rank
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120        # two minutes before the end: all save the same step
#SBATCH --requeue                # and a job that is requeued goes on from there

cd "$SLURM_SUBMIT_DIR" || exit 2
# --kill-on-bad-exit: one that fails ends the others at once, not after JAX's heartbeat
srun --kill-on-bad-exit=1 .venv/bin/python train.py "$@"
