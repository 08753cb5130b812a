#!/usr/bin/env bash
# Runs the linter and the tests; arguments go to pytest: bash scripts/run_tests.sh -k golden
# Two processes share the test files; `-n 0` runs them in one, as a debugger needs it.
# Installs nothing, unless --install is among the arguments (environment.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread each, or the two slow each other down
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -m "not slow" -n 2 --dist loadfile "$@"
