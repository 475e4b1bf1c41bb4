#!/bin/bash
# All that needs a GPU, in one call of less than 9 minutes: build, tests, compute-sanitizer, benchmarks.
#
#   bash bench/gpu.sh RESULTS             a directory for logs, JSON and tables
#   bash bench/gpu.sh --dry-run RESULTS   without GPU and compiler: small problems on the CPU, to try the script
#
# Works in the checkout: builds e2cm_ext in place, downloads nothing. Wants python3 with torch, pybind11, cmake, ninja,
# pytest and hypothesis, and nvcc. A step that fails or takes too long does not stop the others; the outcome of each is
# in RESULTS/steps.json, and the script's own status says whether all of them passed. GPU_JOBS names a directory of
# further scripts (*.sh), which get RESULTS as their argument and the time that is left. GPU_SECONDS (default: 530) is
# the time for all.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=${DRY:-0}
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
[ $# -eq 1 ] || { sed -n 2,6p bench/gpu.sh; exit 2; }
mkdir -p "$1" || exit 2
results=$(cd "$1" && pwd)
budget=${GPU_SECONDS:-530} failed=0 lines=()
python=${PYTHON:-python3}
bench=("$python" -m bench)

# step NAME SECONDS COMMAND...: at most that long, and no longer than the budget lasts.
step() {
  local name=$1 limit=$2 left=$((budget - SECONDS)) start=$SECONDS status
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  printf '=== [%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$name"
  if [ "$limit" -le 0 ]; then
    status=skipped
  elif timeout -k 5 "$limit" "$@" >"$results/$name.log" 2>&1; then
    status=ok
  else
    case $? in
      124 | 137) status=timeout ;;
      *) status=failed ;;
    esac
  fi
  [ $status = ok ] || failed=1
  [ $status = ok ] || tail -n 15 "$results/$name.log" 2>/dev/null
  lines+=("{\"step\": \"$name\", \"status\": \"$status\", \"seconds\": $((SECONDS - start)), \"limit\": $limit}")
  (IFS=,; printf '[%s]\n' "${lines[*]}") >"$results/steps.json"
  printf '    %s, %d s\n' "$status" $((SECONDS - start))
}

# A small suite: compute-sanitizer makes everything some ten to a hundred times slower.
small="by_hand or empty_batches or start_anywhere or in_graphs"
if [ "$dry" = 1 ]; then
  tests=(env PYTHONSAFEPATH=1 "$python" -m pytest -q -p no:cacheprovider)  # of the e2cm_ext that is installed
  step machine 300 "$python" -c 'import torch; print(torch.__version__, "no GPU")'
  step tests 300 "${tests[@]}" tests/test_build.py
  step memcheck 300 "${tests[@]}" tests/ops/test_ops.py -k by_hand
  step gpu_kernels 300 "${bench[@]}" gpu_kernels --dry-run --seconds 0.01 --json "$results/gpu_kernels.json"
else
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  export HYPOTHESIS_PROFILE=brief
  tests=("$python" -m pytest -q --maxfail=25 -m cuda -p no:cacheprovider tests/ops/test_cuda.py tests/ops/test_ops.py
    tests/ops/test_statistics.py)
  step machine 30 bash -c 'nvidia-smi; nvcc --version; nproc; '"$python"' -c "import torch; print(torch.__version__)"'
  # The architecture at hand alone: the others are built where there is more time.
  arch=$("$python" -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))' 2>/dev/null || echo 90)
  # By cmake alone: what pip wants beside it (a new setuptools) may not be there.
  step build 150 bash -euc '
    cmake -S csrc -B build/gpu -G Ninja -DE2CM_CUDA=ON -DE2CM_CUDA_ARCHS="$1" -DE2CM_VERSION=0 \
      -DPython_EXECUTABLE="$(command -v "$2")" -Dpybind11_DIR="$("$2" -m pybind11 --cmakedir)"
    cmake --build build/gpu --target _native
    cmake --install build/gpu --prefix e2cm_ext' build "$arch" "$python"
  step tests 120 "${tests[@]}"
  for tool in memcheck racecheck; do
    step $tool 60 compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
      "${tests[@]}" -k "$small"
  done
  step gpu_kernels 120 "${bench[@]}" gpu_kernels --json "$results/gpu_kernels.json"
  step end_to_end 100 "${bench[@]}" end_to_end --torchvision resnet50 --device cuda --sizes 256 --rounds 3 \
    --json "$results/end_to_end.json"
fi
if [ -n "${GPU_JOBS:-}" ]; then
  for job in "$GPU_JOBS"/*.sh; do
    [ -f "$job" ] && step "job-$(basename "$job" .sh)" $((budget - SECONDS)) bash "$job" "$results"
  done
fi
"$python" - "$results" <<'END' || failed=1
import json, pathlib, sys
results = pathlib.Path(sys.argv[1])
steps = json.loads((results / "steps.json").read_text())
lines = ["| step | | s |", "| :-- | :-- | --: |"]
lines += [f"| {s['step']} | {s['status']} | {s['seconds']} |" for s in steps]
for name in ("gpu_kernels", "end_to_end"):
    log = results / f"{name}.log"
    if log.exists():
        lines += ["", *(line for line in log.read_text().splitlines() if line.startswith(("|", "copy")) or "GB/s" in line)]
(results / "table.md").write_text("\n".join(lines) + "\n")
print("\n".join(lines))
END
exit $failed
