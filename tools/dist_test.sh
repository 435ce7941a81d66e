#!/usr/bin/env bash
# Test in several processes, on GPUs or (over gloo) on the CPU, by mmdet's own script:
#   bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [arguments of tools/test.py]
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT PROCESSES [arguments of tools/test.py]" >&2
    exit 2
fi
script=$(python "$(dirname "$0")/mmdet_tool.py" dist_test.sh)
exec bash "$script" "$@"
