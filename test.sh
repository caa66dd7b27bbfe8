#!/usr/bin/env bash
# Install what the tests need into .venv, check the style, run the tests.
# Arguments go to pytest:  ./test.sh tests/test_utils.py -k config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/setup_venv.sh
setup_venv requirements.txt tools/requirements.txt tests/requirements.txt tests/requirements-no-deps.txt

.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
