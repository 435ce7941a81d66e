#!/usr/bin/env bash
# Train in several processes, on GPUs or (over gloo) on the CPU, by mmdet's own script:
#   bash tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG PROCESSES [arguments of tools/train.py]" >&2
    exit 2
fi
script=$(python "$(dirname "$0")/mmdet_tool.py" dist_train.sh)
exec bash "$script" "$@"
