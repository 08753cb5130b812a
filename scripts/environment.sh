#!/usr/bin/env bash
# Finds a Python that has what requirements.txt asks for, and installs nothing unless asked. Source it from the
# repository's root: it sets PYTHON and takes --install out of the arguments.
#
# PYTHON, if set, is used. Otherwise the first of these that has all requirements: the active environment, .venv here,
# python3 and python on the PATH. With --install (or INSTALL=1) .venv is made, filled from requirements.txt and used.
#
# Environment: PYTHON, INSTALL, VENV (instead of .venv).
venv=${VENV:-.venv}
arguments=()
for argument in "$@"; do
    if [ "$argument" = --install ]; then INSTALL=1; else arguments+=("$argument"); fi
done
set -- ${arguments[@]+"${arguments[@]}"}

new_enough() {
    command -v "$1" > /dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null
}

if [ "${INSTALL:-}" = 1 ]; then
    if [ ! -x "$venv/bin/python" ]; then
        for base in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12 python3.11 python3.10; do
            new_enough "$base" && break
            base=""
        done
        if [ -z "$base" ]; then
            echo "Python 3.10 or newer is needed: set PYTHON to one" >&2
            exit 1
        fi
        echo "making the environment $venv"
        "$base" -m venv "$venv"
    fi
    PYTHON=$venv/bin/python
    if ! "$PYTHON" scripts/check_requirements.py > /dev/null 2>&1; then
        echo "installing requirements.txt into $venv (torch is large: a minute or more)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
elif [ -z "${PYTHON:-}" ]; then
    first=""
    for candidate in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} "$venv/bin/python" python3 python; do
        new_enough "$candidate" || continue
        first=${first:-$candidate}
        if "$candidate" scripts/check_requirements.py > /dev/null 2>&1; then
            PYTHON=$candidate
            break
        fi
    done
    PYTHON=${PYTHON:-$first}
    if [ -z "$PYTHON" ]; then
        echo "Python 3.10 or newer is needed: set PYTHON to one" >&2
        exit 1
    fi
fi

if ! missing=$("$PYTHON" scripts/check_requirements.py); then
    echo "missing in $PYTHON: ${missing:-what requirements.txt asks for}; install it with" \
        "'python -m venv .venv && .venv/bin/pip install -r requirements.txt', or run this script with --install" >&2
    exit 1
fi
export PYTHON
