#!/usr/bin/env bash
# Everything that must hold before a change lands: linters, types, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
python scripts/make_profiles.py --check
python -m pytest -q -n "${AUTOFIT_TEST_WORKERS:-2}" --dist loadfile
