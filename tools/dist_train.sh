#!/usr/bin/env bash
# Train in several processes, on GPUs or (over gloo) on the CPU:
#   bash tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]
# NNODES, NODE_RANK, MASTER_ADDR and PORT mean what they mean in mmdet's script of this name.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG PROCESSES [arguments of tools/train.py]" >&2
    exit 2
fi
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$2" "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
