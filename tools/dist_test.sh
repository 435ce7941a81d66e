#!/usr/bin/env bash
# Test in several processes, on GPUs or (over gloo) on the CPU:
#   bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [arguments of tools/test.py]
# NNODES, NODE_RANK, MASTER_ADDR and PORT mean what they mean in mmdet's script of this name.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT PROCESSES [arguments of tools/test.py]" >&2
    exit 2
fi
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$3" "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
