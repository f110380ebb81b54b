#!/usr/bin/env bash
# Install what the tests need, check style, and run the tests.
#
#   bash scripts/test.sh [--active] [arguments for pytest]
#
# Files of tests are spread over the cores; "-n 0" among the arguments keeps them in one process, for a debugger.
#
# --active   use the active Python environment instead of .venv (so does ANIMASK_USE_ACTIVE_ENV=1)
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$0" "$@"
if [ "${1:-}" = --active ]; then
    ANIMASK_USE_ACTIVE_ENV=1
    shift
fi

cd "$ROOT"
ensure_env requirements-dev.txt

python -m ruff check .
python -m ruff format --check .
python -m pytest -q -n auto --dist loadfile "$@"
