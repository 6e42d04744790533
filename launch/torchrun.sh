#!/usr/bin/env bash
# One node's share of a job on several machines, without a scheduler: run this on every node.
#
#   NODES=4 NODE=0 MASTER=host0 launch/torchrun.sh -m lab.paper.attention --out /shared/artifact
#   NODES=4 NODE=0 MASTER=host0 launch/torchrun.sh "$(command -v dcp)" train job.yaml
#
# With `resume_from_checkpoint: auto` in job.yaml, a job that is started again goes on.
# NODE counts from 0; MASTER is the address of node 0, PORT one of its free ports.
set -euo pipefail
: "${NODES:?how many machines}" "${NODE:?number of this machine}" "${MASTER:?address of machine 0}"
exec torchrun \
  --nnodes "$NODES" --node-rank "$NODE" \
  --nproc-per-node "${RANKS_PER_NODE:-gpu}" \
  --master-addr "$MASTER" --master-port "${PORT:-29400}" \
  "$@"
