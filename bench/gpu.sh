#!/usr/bin/env bash
# Everything there is to measure on one GPU, in under 9 minutes: exactness, two ceilings, all methods on five models.
#
#   bash bench/gpu.sh                          # writes results/gpu-DATE/*.json
#   bash bench/gpu.sh --engines compile        # another 9 minutes for what compiling did not leave time for
#   bash bench/gpu.sh --tiny                   # a rehearsal on any machine, CPU included, in a minute
#
# Needs no installation: a copy of the working tree, and a Python with torch and timm (PYTHON=... to choose one).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src:tests:tests/life${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=PASSIVE
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
exec "$python" bench/gpu.py "$@"
