#!/bin/bash
# A TPU slice that is waited for: bash launch/tpu_queued.sh NAME ZONE TYPE
#   bash launch/tpu_queued.sh sit us-east5-a v5p-256
# RUNTIME: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e, tpu-ubuntu2204-base for v4.
# Several slices as one run (hybrid parallelism): SLICES=2 bash launch/tpu_queued.sh ...
# When the state is ACTIVE: CREATE=no bash launch/tpu_vm.sh NAME ..., for each slice (the
# nodes are NAME-0, NAME-1, ...) at the same time.
set -eu
name=$1 zone=$2 type=$3
nodes=(--node-id "$name")
if [ "${SLICES:-1}" -gt 1 ]; then nodes=(--node-count "$SLICES" --node-prefix "$name"); fi

gcloud compute tpus queued-resources create "$name" --zone "$zone" "${nodes[@]}" \
    --accelerator-type "$type" --runtime-version "${RUNTIME:-v2-alpha-tpuv5}" \
    ${SPOT:+--spot}      # SPOT=1: cheaper, and may be taken away; the run then goes on
                         # from its newest checkpoint when the same command is given again

watch -n 60 gcloud compute tpus queued-resources describe "$name" --zone "$zone" \
    --format "'value(state.state)'"
