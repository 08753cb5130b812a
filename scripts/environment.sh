#!/usr/bin/env bash
# Makes the virtual environment that quickstart.sh and run_tests.sh use, or takes the one that is active or named.
# Source it; afterwards $PYTHON is an interpreter with requirements.txt installed.
#
# Environment: PYTHON (an interpreter to use as it is), VENV (folder of the environment; default .venv).
if [ -z "${PYTHON:-}" ] && [ -n "${VIRTUAL_ENV:-}" ]; then
    PYTHON=$VIRTUAL_ENV/bin/python
fi
if [ -z "${PYTHON:-}" ]; then
    venv=${VENV:-.venv}
    if [ ! -x "$venv/bin/python" ]; then
        base=""
        for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
            if command -v "$candidate" > /dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
                base=$candidate
                break
            fi
        done
        if [ -z "$base" ]; then
            echo "Python 3.10 or newer is needed; set PYTHON to one" >&2
            exit 1
        fi
        echo "making the environment $venv with $("$base" --version)"
        "$base" -m venv "$venv"
    fi
    PYTHON=$(cd "$(dirname "$venv/bin/python")" && pwd)/python
fi
if ! cmp -s requirements.txt "$(dirname "$PYTHON")/../td4v-requirements.txt" 2> /dev/null; then
    echo "installing requirements.txt (torch is large: a minute or more)"
    "$PYTHON" -m pip install --quiet --root-user-action=ignore --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$(dirname "$PYTHON")/../td4v-requirements.txt" 2> /dev/null || true
fi
export PYTHON
