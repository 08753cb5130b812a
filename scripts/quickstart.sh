#!/usr/bin/env bash
# Makes videos, trains and tests TD4V on a CPU, and writes a table and a figure.
# Installs nothing, unless --install is among the arguments (environment.sh).
#
#   bash scripts/quickstart.sh [--install] [--seeds 0 1 2] [--output quickstart] [--short]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
exec "$PYTHON" -m scripts.quickstart "$@"
