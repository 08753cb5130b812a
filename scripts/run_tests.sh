#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest, e.g. bash scripts/run_tests.sh -k golden
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -m "not slow" "$@"
