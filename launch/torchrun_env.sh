#!/bin/bash
# The variables that torchrun sets, by hand. On each of two machines, N being 0 and 1:
#   N=0 MASTER_ADDR=10.0.0.1 bash launch/torchrun_env.sh --config configs/sit_xl2.py ...
# One process a machine takes all of its GPUs. MASTER_PORT must be reachable at
# MASTER_ADDR, which is machine 0. torchrun itself does the same, one process a GPU:
#   torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \
#       --rdzv-endpoint 10.0.0.1:29400 train.py --config configs/sit_xl2.py ...
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
export WORLD_SIZE=${WORLD_SIZE:-2} RANK=${N:?which machine this is, from 0}
exec .venv/bin/python train.py "$@"
