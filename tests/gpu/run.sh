#!/usr/bin/env bash
# All that only a GPU can show: the contract suite, faults, graphs, stress, random programs, the
# sanitizers on a small case. Ranks share GPUs when there are fewer. Closes with a line "N passed, N
# failed, N skipped"; --full takes ten times as long.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
times=1
[[ ${1:-} == --full ]] && times=10
passed=0 failed=0 skipped=0

run() { # command... whose last matching line says "N passed, N failed[, N skipped]"
  local log line status=0
  log=$(mktemp)
  printf '== %s\n' "$*"
  "$@" >"$log" 2>&1 || status=$?
  grep -v '^\r' "$log" | tail -n 30
  line=$(grep -oE '[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?' "$log" | tail -n 1)
  rm -f "$log"
  read -r p f s <<<"$(tr -cd '0-9 ' <<<"$line")"
  passed=$((passed + ${p:-0})) failed=$((failed + ${f:-0})) skipped=$((skipped + ${s:-0}))
  # 77: nothing could run here.
  if ((status != 0 && status != 77)) && [[ ${f:-0} == 0 ]]; then failed=$((failed + 1)); fi
}

probe() { # command: counts as one
  printf '== %s\n' "$*"
  local status=0
  "$@" || status=$?
  case $status in
  0) passed=$((passed + 1)) ;;
  77) skipped=$((skipped + 1)) ;;
  *) failed=$((failed + 1)) ;;
  esac
}

# Between nodes, which ranks pose as: NVSHMEM as Python has it, or as NVSHMEM_HOME says. Its parts
# for networks and for NVLink multicast are not what is tested.
nvshmem=$(python3 -c "import importlib.util as u; s = u.find_spec('nvidia.nvshmem')
print(s.submodule_search_locations[0] if s else '')" 2>/dev/null)
export LD_LIBRARY_PATH=${NVSHMEM_HOME:-$nvshmem}/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export NVSHMEM_DISABLE_NVLS=1 NVSHMEM_DISABLE_NCCL=1 NVSHMEM_REMOTE_TRANSPORT=none

probe bin/gpu_owner_death
probe bin/cuda_shared_headers
run bin/contract_suite --backend cuda --timeout-ms 20000
run bin/contract_suite --backend cuda --mode low-latency --timeout-ms 20000
several_nodes=0
[[ -x bin/gpu_nvshmem_probe && -e ${NVSHMEM_HOME:-$nvshmem}/lib/libnvshmem_host.so.3 ]] &&
  several_nodes=1
if ((several_nodes)); then
  run bin/gpu_nvshmem_probe 4
  run bin/contract_suite --backend cuda --mode internode --timeout-ms 20000
  # What a network takes, also where memory is mapped.
  DEEP_EP_NVSHMEM_PUTS_ONLY=1 run bin/contract_suite --backend cuda --mode internode \
    --timeout-ms 20000
  run bin/contract_suite --backend cuda --mode internode-low-latency --timeout-ms 20000
  DEEP_EP_NVSHMEM_PUTS_ONLY=1 run bin/contract_suite --backend cuda \
    --mode internode-low-latency --timeout-ms 20000
  # Two ranks a node run below; here a rank that has its node for itself, and puts.
  run bin/gpu_faults $times internode 1
  DEEP_EP_NVSHMEM_PUTS_ONLY=1 run bin/gpu_faults $times internode 1
  DEEP_EP_NVSHMEM_PUTS_ONLY=1 run bin/gpu_faults $times internode 2
else
  printf '== several nodes: SKIPPED, no NVSHMEM (nvidia-nvshmem-cu13 from pip, or NVSHMEM_HOME)\n'
  skipped=$((skipped + 9))
fi
run bin/gpu_faults $times
run bin/gpu_counts
run bin/gpu_growth
run bin/gpu_graph $((100 * times))
run bin/gpu_low_latency $((50 * times))
run bin/gpu_stress $((1000 * times))
run bin/fuzz exchange --backend cuda --count $((1000 * times)) --seconds $((60 * times))
if [[ ! -d python ]]; then
  printf '== Python: SKIPPED, the package was not built\n'
  skipped=$((skipped + 1))
elif ! python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  printf '== Python: SKIPPED, python3 has no torch with CUDA\n'
  skipped=$((skipped + 1))
else
  PYTHONPATH=$PWD/python run python3 -m pytest -q -rs -p no:cacheprovider -m gpu tests/python
fi
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    run compute-sanitizer --tool $tool --error-exitcode 1 --target-processes all \
      bin/deepep verify --backend cuda --ranks 2 --tokens 64 --hidden 512
    for wire in bf16 logfmt; do
      run compute-sanitizer --tool $tool --error-exitcode 1 --target-processes all \
        bin/deepep verify low-latency --backend cuda --ranks 2 --tokens 8 --hidden 512 --wire $wire
    done
  done
  # No racecheck: it knows barriers, and takes words that warps acquire and release for races.
  if ((several_nodes)); then
    DEEP_EP_RANKS_PER_NODE=1 run compute-sanitizer --tool memcheck --error-exitcode 1 \
      --target-processes all bin/deepep verify internode --backend cuda --nodes 2 \
      --ranks-per-node 1 --tokens 64 --hidden 512
  fi
else
  printf '== compute-sanitizer: SKIPPED, it is not installed\n'
  skipped=$((skipped + 6 + several_nodes))
fi
printf '\n%d passed, %d failed, %d skipped\n' $passed $failed $skipped
((failed == 0))
