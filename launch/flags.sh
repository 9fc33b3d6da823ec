#!/bin/bash
# Any machines, without a scheduler: the same command on each, but for --process.
#   bash launch/flags.sh 10.0.0.1:8476 2 0 --config configs/sit_xl2.py --workdir /shared/xl2
#   bash launch/flags.sh 10.0.0.1:8476 2 1 --config configs/sit_xl2.py --workdir /shared/xl2
# SCRIPT=sample.py, extract_features.py or evaluate.py run the same way.
exec .venv/bin/python "${SCRIPT:-train.py}" "${@:4}" \
    --coordinator "$1" --processes "$2" --process "$3"
