#!/usr/bin/env bash
# All that this machine's GPUs can show: every test (run.sh --full), then every figure (gpu.sh
# FOLDER, default results), with a table of what is wanted beside what was measured. Figures are
# taken whatever the tests say; the exit status says whether both passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
status=0
./run.sh --full || status=1
./gpu.sh "$@" || status=1
exit $status
