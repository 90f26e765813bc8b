#!/usr/bin/env bash
# Everything that must hold before a change lands: linters, types, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
# Compiled once: the tests start dozens of processes, and the libraries were installed without.
unset PYTHONDONTWRITEBYTECODE
ruff check .
ruff format --check .
MYPY_NUM_WORKERS=2 mypy
python scripts/make_profiles.py --check
python scripts/make_benchmarks.py --check
# Two processes of one thread each: on two cores, two of two spend their time waiting for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -q -m 'not slow' -n "${AUTOFIT_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder \
  --durations 12
