#!/usr/bin/env bash
# What only a GPU can show, in three commands of at most eight minutes that leave eight files.
#
#   bench/on_gpu.sh check OUTDIR   build for this GPU, every kernel under memcheck, the GPU tests
#   bench/on_gpu.sh bench OUTDIR   the benchmark, with the peers that are installed
#   bench/on_gpu.sh tune OUTDIR    search the launch policy
#
# Needs torch, Triton and pytest, for some steps nvcc and compute-sanitizer; no network. What failed,
# or found no time, is named at the end. The same command goes on: what was built, what Triton
# compiled and what the benchmark measured is kept. DEVICE=cpu LIMIT=60 tries the steps where there
# is no GPU, TESTS="tests/test_x.py .." with fewer tests.
set -euo pipefail

DEVICE=${DEVICE:-cuda}
LIMIT=${LIMIT:-480} # seconds of one command
PYTHON=${PYTHON:-python3}

fail() {
  echo "on_gpu: $*" >&2
  exit 1
}

failed=()
# NAME COMMAND..: run it in what is left of the time; go on if it fails.
step() {
  local name=$1 code=0 left=$((LIMIT - SECONDS))
  shift
  echo "== $name, $left s left"
  if ((left > 0)); then timeout "$left" "$@" || code=$?; else code=124; fi
  ((code == 0)) || failed+=("$name (exit code $code)")
}

# Plugins that happen to be installed stay out, but for the one that shares tests out to processes.
tests=(env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q)
harness=("$PYTHON" -m bench)
here=(--device "$DEVICE") without=()
if [[ $DEVICE != cuda ]]; then
  here+=(--threads 1 --clock process)
  without=(--without torch.compile)
fi

# Whether the extension is there for the device, and newer than its sources.
built() {
  local made=(fusednorm/_C*.so)
  [[ -e ${made[0]} && -z $(find csrc setup.py -newer "${made[0]}") ]] && "$PYTHON" -c "
import sys, torch
from bench.providers import find
sys.exit(bool(find(['fusednorm-$DEVICE'], torch.device('$DEVICE'))[1]))"
}

check() {
  local arch="" parallel=() ignored=()
  if [[ $DEVICE == cuda ]]; then # for this GPU alone: the others would take as long again, each
    arch=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
  fi
  built || step build env "FUSEDNORM_BUILD=$DEVICE" "TORCH_CUDA_ARCH_LIST=$arch" \
    "$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps -e .
  step installed "$PYTHON" -m fusednorm
  # Once without the sanitizer, which then spends its time on watching, not on compiling.
  step kernels "${tests[@]}" tests/test_every_kernel.py
  # Without the caching allocator an access out of bounds is one out of an allocation. torch asks
  # the driver for more than every driver has, and lives with the answer.
  step memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
    --error-exitcode 1 --kernel-name kns=layer_norm --report-api-errors no \
    "${tests[@]}" tests/test_every_kernel.py
  if [[ $DEVICE == cuda ]] && "$PYTHON" -c 'import xdist' 2>/dev/null; then
    parallel=(-p xdist.plugin -n 8 --dist worksteal)
  fi
  # These need no GPU, or ran.
  for file in bench codegen config cpu every_kernel examples imports simt; do
    ignored+=(--ignore "tests/test_$file.py")
  done
  step tests "${tests[@]}" --maxfail 20 "${parallel[@]}" "${ignored[@]}" ${TESTS:-tests}
}

measure() { # NAME SHARE OPTION..: measure for a share of the time, into the file of all
  step "$1" "${harness[@]}" "${here[@]}" --seconds $((LIMIT * $2 / 100)) \
    --out "$OUT/bench.json" "${without[@]}" "${@:3}"
}

# torch.compile takes longer to compile than everybody takes to be measured.
bench() {
  local common=(--mode layer_norm/forward --mode layer_norm/backward --without torch.compile)
  measure host 5 --group host --without torch.compile
  measure quick 35 --group quick
  measure bandwidth 20 --group bandwidth "${common[@]}"
  measure latency 15 --group latency "${common[@]}"
  step selfcheck "${harness[@]}" selfcheck "${here[@]}"
}

tune() {
  local way
  : >"$OUT/tune.diff"
  for way in forward backward; do
    step "$way" "${harness[@]}" tune --device "$DEVICE" --dtype bfloat16 --direction "$way" \
      --seconds $((LIMIT * 40 / 100)) > >(tee -a "$OUT/tune.diff")
  done
}

main() {
  "$1"
  ((${#failed[@]} == 0)) || fail "$1: failed or found no time: ${failed[*]}"
  echo "== $1: passed in $SECONDS s"
}

[[ $# == 2 && $1 =~ ^(check|bench|tune)$ ]] || {
  echo "usage: bench/on_gpu.sh check|bench|tune OUTDIR" >&2
  exit 2
}
mkdir -p "$2"
OUT=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
if [[ $DEVICE == cuda ]]; then
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "expected a GPU that torch can use, found none"
  unset TRITON_INTERPRET
else
  export TRITON_INTERPRET=1
fi
export PYTHONUNBUFFERED=1
main "$1" 2>&1 | tee "$OUT/$1.log"
