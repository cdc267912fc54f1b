#!/usr/bin/env bash
# Measures what docs/performance.md shows of GPUs, one rank a GPU: sweeps over SMs and tokens, each
# result checked, as JSON in FOLDER (default: results beside this script).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
folder=${1:-results}
mkdir -p "$folder"
ranks=${RANKS:-$(nvidia-smi -L | wc -l)}
common=(--backend cuda --ranks "$ranks" --iters 7 --warmup 5 --chain 100 --live-results 5)

bench() { # name argument...
  bin/deepep bench intranode "${common[@]}" "${@:2}" --json "$folder/$1_r$ranks.json"
}
low_latency() { # name argument...
  bin/deepep bench low-latency --backend cuda --ranks "$ranks" --iters 21 --warmup 5 --chain 100 \
    --mode eager,graph --comm-stream "${@:2}" --json "$folder/$1_r$ranks.json"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
bench sms --tokens 4096 --dtype bf16,fp8 --num-sms 1,2,4,8,12,16,20,24,32,64,132
bench tokens --tokens 1,16,128,512,2048,8192 --dtype bf16,fp8 --num-sms 16,20
# A graph keeps the results of all of its calls.
bin/deepep bench intranode --backend cuda --ranks "$ranks" --iters 7 --warmup 5 --chain 20 --graph \
  --comm-stream --tokens 128,4096 --dtype bf16,fp8 --num-sms 16,20,132 \
  --json "$folder/graphs_r$ranks.json"
bench small_own_stream --tokens 1,128 --dtype bf16 --num-sms 8,16 --comm-stream
tokens=1,2,4,8,16,32,64,128,256,512
low_latency low_latency_quantised --payload fp8 --tokens $tokens --max-tokens 512
low_latency low_latency_given_fp8 --payload scaled-fp8 --format rank-major --tokens $tokens \
  --max-tokens 512
# Of a Buffer for more tokens, and of one for as many.
few=1,16,32,64,128,256
low_latency low_latency_quantised_m256 --payload fp8 --tokens $few --max-tokens 256
low_latency low_latency_given_fp8_m256 --payload scaled-fp8 --format rank-major --tokens $few \
  --max-tokens 256
for tokens in 1 16 32 64 128; do
  most=(--tokens "$tokens" --max-tokens "$tokens")
  low_latency "low_latency_quantised_t$tokens" --payload fp8 "${most[@]}"
  low_latency "low_latency_given_fp8_t$tokens" --payload scaled-fp8 --format rank-major "${most[@]}"
done
low_latency low_latency_wires --payload bf16 --wire bf16,logfmt,fp8 --tokens 1,16,128,512

# Between nodes, which two GPUs pose as, beside what puts reach in the same run.
nvshmem=${NVSHMEM_HOME:-$(python3 -c "import importlib.util as u
s = u.find_spec('nvidia.nvshmem'); print(s.submodule_search_locations[0])" 2>/dev/null || true)}
if ((ranks >= 2)) && [[ -e $nvshmem/lib/libnvshmem_host.so.3 ]]; then
  between_nodes() { # name argument...
    LD_LIBRARY_PATH=$nvshmem/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} NVSHMEM_DISABLE_NVLS=1 \
      NVSHMEM_DISABLE_NCCL=1 NVSHMEM_REMOTE_TRANSPORT=none bin/deepep bench internode \
      --backend cuda --nodes 2 --ranks-per-node 1 --iters 3 --warmup 5 --chain 100 "${@:2}" \
      --json "$folder/$1.json"
  }
  between_nodes internode_n2 --tokens 1,4096 --num-sms 20,64,132
  # By puts, as over a network, though the memory is mapped; in a folder that no table reads.
  mkdir -p "$folder/puts"
  DEEP_EP_NVSHMEM_PUTS_ONLY=1 between_nodes puts/internode_n2 --tokens 4096 --num-sms 20,132
else
  printf 'Between nodes: SKIPPED, needs two GPUs and NVSHMEM (nvidia-nvshmem-cu13 from pip)\n'
fi

printf '\nBeside what is wanted (gpu_goals.py):\n'
python3 gpu_goals.py "$folder" | tee "$folder/goals.md" || printf 'SKIPPED, no python3\n'

has_torch() { python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; }
if [[ ! -d python ]] || ! has_torch; then
  printf 'Python: SKIPPED, the package was not built or python3 has no torch with CUDA\n'
  exit
fi
bench beside --tokens 128,4096 --dtype bf16,fp8 --num-sms 16
beside=()
for name in graphs beside low_latency_quantised_t1 low_latency_quantised_t128; do
  beside+=("$folder/${name}_r$ranks.json")
done
PYTHONPATH=$PWD/python python3 -m torch.distributed.run --nproc-per-node "$ranks" python_calls.py \
  --beside "${beside[@]}" --json "$folder/python_calls_r$ranks.json"
