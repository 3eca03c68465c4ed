#!/usr/bin/env bash
# All GPU measurements in less than 9 minutes: exactness, two hardware ceilings, all methods on five models.
#
#   bash bench/gpu.sh                          # writes results/gpu-DATE/*.json
#   bash bench/gpu.sh --engines compile        # 9 more minutes, for jobs that were left out (checks.json lists them)
#   bash bench/gpu.sh --tiny                   # a one-minute test on any machine, also without a GPU
#
# No installation: it needs a copy of the working tree, and a Python with torch and timm (PYTHON=... selects one).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src:tests:tests/slimming${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=PASSIVE
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
exec "$python" bench/gpu.py "$@"
