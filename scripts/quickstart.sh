#!/usr/bin/env bash
# From nothing to a trained, tested TD4V on a CPU: environment, data, four experiments, a table and a picture.
#
#   bash scripts/quickstart.sh [--seeds 0 1 2] [--output quickstart] [--short]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
exec "$PYTHON" -m scripts.quickstart "$@"
