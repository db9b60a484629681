#!/usr/bin/env bash
# Everything that only a GPU can show, in steps of at most eight minutes. Needs torch, Triton, pytest
# and, for some steps, nvcc and compute-sanitizer; needs no network.
#
#   bench/on_gpu.sh OUTDIR                       every step that has not passed yet
#   bench/on_gpu.sh OUTDIR --step bench-a        this step, again if need be
#
# OUTDIR gets a log for each step, the JSON of the benchmark, and NAME.done for what passed.
set -euo pipefail

STEPS="build tests sanitizer indexing graphs bench-a bench-b bench-c bench-d tune selfcheck report"
LIMIT=480 # seconds of one step
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}

usage() {
  echo "usage: bench/on_gpu.sh OUTDIR [--step $(echo "$STEPS" | tr ' ' '|')]" >&2
  exit 2
}

fail() {
  echo "on_gpu: $*" >&2
  exit 1
}

(($# == 1 || $# == 3)) || usage
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
if (($# == 3)); then
  [[ $2 == --step && " $STEPS " == *" $3 "* ]] || usage
  rm -f "$OUT/$3.done"
  STEPS=$3
fi
cd "$(dirname "$0")/.."

if ! "$PYTHON" -c 'import fusednorm.triton_kernels' 2>/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps -e . >"$OUT/install.log" 2>&1 ||
    fail "fusednorm cannot be installed; see install.log"
fi
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

bench() {
  "$PYTHON" -m bench "$@"
}

has_gpu() {
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}

step_build() {
  # The compiled extension, where this version of the project has one.
  if [[ -d csrc/cuda ]]; then
    FUSEDNORM_BUILD=cuda "$PYTHON" setup.py build_ext --inplace
  else
    echo "no csrc/cuda: nothing to build"
  fi
  "$PYTHON" -m fusednorm
}

step_tests() {
  local selection=()
  [[ -n ${TESTS:-} ]] && read -ra selection <<<"$TESTS"
  "$PYTHON" -m pytest -q -x --ignore tests/test_codegen.py --ignore tests/test_examples.py \
    --ignore tests/test_bench.py "${selection[@]}"
}

step_sanitizer() {
  local tool
  has_gpu || fail "sanitizer: expected a GPU that torch can use, found none"
  command -v compute-sanitizer >/dev/null || fail "sanitizer: compute-sanitizer is not installed"
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    # Without the caching allocator an access out of bounds is one out of an allocation.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 115 compute-sanitizer --tool "$tool" \
      --error-exitcode 1 --kernel-regex kns=layer_norm "$PYTHON" -m bench.every_kernel
  done
}

step_indexing() {
  "$PYTHON" -m pytest -q tests/test_layouts.py -k "int32 or 2_31 or device"
}

step_graphs() {
  "$PYTHON" -m pytest -q tests/test_determinism.py tests/test_compile.py -k "graph or equal"
}

step_bench-a() {
  bench --device "$DEVICE" --out "$OUT/bench-a.json" ${QUICK:+--quick}
}

step_bench-b() {
  bench --device "$DEVICE" --out "$OUT/bench-b.json" --group "${GROUP_B:-bandwidth}" \
    --mode layer_norm/forward --mode layer_norm/backward
}

step_bench-c() {
  bench --device "$DEVICE" --out "$OUT/bench-c.json" --group "${GROUP_C:-models}" \
    --mode layer_norm/forward --mode layer_norm/backward --mode add/both
}

step_bench-d() {
  bench --device "$DEVICE" --out "$OUT/bench-d.json" --group "${GROUP_D:-latency}" \
    --mode layer_norm/forward --mode layer_norm/both
}

step_tune() {
  bench tune --seconds 400 --dtype bfloat16 | tee "$OUT/tune.diff"
}

step_selfcheck() {
  bench selfcheck --device "$DEVICE"
}

step_report() {
  local file
  for file in "$OUT"/bench-*.json; do
    [[ -e $file ]] || fail "report: no bench-*.json in OUTDIR yet"
    bench report "$file"
  done
}

export -f bench has_gpu fail
for step in $STEPS; do
  if [[ -e $OUT/$step.done ]]; then
    echo "== $step: passed before"
    continue
  fi
  echo "== $step"
  start=$SECONDS
  export -f "step_$step"
  export OUT PYTHON DEVICE
  code=0
  timeout "$LIMIT" bash -euo pipefail -c "step_$step" 2>&1 | tee "$OUT/$step.log" || code=$?
  ((code != 124)) || fail "$step: not done after $LIMIT seconds; see $step.log"
  ((code == 0)) || fail "$step: exit code $code; see $step.log"
  touch "$OUT/$step.done"
  echo "== $step: passed in $((SECONDS - start)) s"
done
