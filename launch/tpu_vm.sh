#!/bin/bash
# A TPU pod slice as TPU VMs: bash launch/tpu_vm.sh NAME ZONE TYPE SHARE [train.py's flags]
#   REPO=https://... bash launch/tpu_vm.sh sit us-central2-b v4-32 10.0.0.2:/vol1 \
#       --config configs/sit_xl2.py
# SHARE is an NFS share (Filestore), for checkpoints and latents: all hosts must see them
# under one path, and a directory must be renamed at once, which gcsfuse does not do.
# Without one: "none", and a last flag --workdir gs://BUCKET/run; latents then have to be
# on each host's disk. Each host runs the same command; JAX asks the metadata server which
# one it is. RUNTIME: v2-alpha-tpuv5-lite for v5litepod-..., v2-alpha-tpuv5 for v5p-...,
# v2-alpha-tpuv6e for v6e-...; the usual one is for v4. Their Python, 3.10, is too old for JAX.
# CREATE=no: the slice is there, of tpu_queued.sh or of a run that is to go on.
set -eu
name=$1 zone=$2 type=$3 share=$4
shift 4
repo=${REPO:?the address of a git repository with this code}
ssh=(gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command)

[ "${CREATE:-yes}" = no ] || gcloud compute tpus tpu-vm create "$name" --zone "$zone" --accelerator-type "$type" \
    --version "${RUNTIME:-tpu-ubuntu2204-base}"

"${ssh[@]}" "(test -d sit || git clone $repo sit) && cd sit && python3 -m pip install -q uv \
    && (test -d .venv || python3 -m uv venv -q --seed --python 3.12 .venv) \
    && .venv/bin/pip install -q -r requirements.txt 'jax[tpu]' gcsfs"
[ "$share" = none ] || "${ssh[@]}" "sudo apt-get install -qy nfs-common \
    && sudo mkdir -p /shared && (mountpoint -q /shared || sudo mount -t nfs $share /shared)"

"${ssh[@]}" "cd sit && .venv/bin/python train.py --workdir /shared/run ${*@Q}"

# to end it so that all hosts save the same step:
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker 0 --command 'pkill -TERM -f [t]rain.py'
# gcloud compute tpus tpu-vm delete NAME --zone ZONE
