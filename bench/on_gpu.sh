#!/usr/bin/env bash
# Everything that only a GPU can show, in steps of at most eight minutes. Needs torch, Triton, pytest
# and, for some steps, nvcc and compute-sanitizer; needs no network.
#
#   bench/on_gpu.sh OUTDIR                       every step that has not passed yet
#   bench/on_gpu.sh OUTDIR --step bench-a        this step, again if need be
#
# OUTDIR gets a log for each step, the JSON of the benchmark, and NAME.done for what passed. A step
# that runs out of time goes on where it was when it is run again: Triton keeps what it compiled, the
# benchmark what it measured. The other steps run all the same; the end says what failed.
set -euo pipefail

STEPS="build kernels tests-a tests-b indexing graphs bench-a sanitizer"
STEPS+=" bench-b bench-c bench-d tune-forward tune-backward selfcheck report"
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

if [[ $DEVICE == cuda ]]; then
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "expected a GPU that torch can use, found none"
fi
if ! "$PYTHON" -c 'import fusednorm.triton_kernels' 2>/dev/null; then
  FUSEDNORM_BUILD=none "$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps \
    -e . >"$OUT/install.log" 2>&1 || fail "fusednorm cannot be installed; see install.log"
fi
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

bench() {
  "$PYTHON" -m bench "$@"
}

# Plugins that happen to be installed stay out, but for the one that shares tests out to processes.
tests() {
  local parallel=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    parallel=(-p xdist.plugin -n 8 --dist worksteal)
  fi
  PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1 \
    "$PYTHON" -m pytest -q --maxfail 20 "${parallel[@]}" "$@"
}

step_build() {
  local kind=cpu
  if [[ -d csrc/cuda && $DEVICE == cuda ]]; then
    kind=cuda
    # For this GPU alone: the others would take as long again, each.
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c \
      'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
    export TORCH_CUDA_ARCH_LIST
  fi
  FUSEDNORM_BUILD=$kind "$PYTHON" setup.py build_ext --inplace
  "$PYTHON" -m fusednorm
}

# Also compiles what the sanitizer watches, so that it spends its time on watching.
step_kernels() {
  "$PYTHON" -m bench.every_kernel
}

step_tests-a() {
  tests tests/test_terms.py tests/test_dropout.py tests/test_determinism.py
}

# The rest, without what runs on no GPU.
step_tests-b() {
  local file files=()
  for file in tests/test_*.py; do
    case $(basename "$file" .py) in
      test_terms | test_dropout | test_determinism) ;;
      test_bench | test_codegen | test_config | test_cpu | test_examples | test_imports | test_simt) ;;
      *) files+=("$file") ;;
    esac
  done
  tests "${files[@]}"
}

step_sanitizer() {
  local tool options
  command -v compute-sanitizer >/dev/null || fail "sanitizer: compute-sanitizer is not installed"
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    options=(--tool "$tool" --error-exitcode 1 --kernel-name kns=layer_norm)
    # torch asks the driver for more than every driver has, and lives with the answer.
    [[ $tool != memcheck ]] || options+=(--report-api-errors no)
    # Without the caching allocator an access out of bounds is one out of an allocation.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 115 \
      compute-sanitizer "${options[@]}" "$PYTHON" -m bench.every_kernel | tee "$OUT/$tool.log"
    grep -Eq "SUMMARY: 0 (errors|hazards)" "$OUT/$tool.log" ||
      fail "sanitizer: $tool complains, or watched nothing; see $tool.log"
  done
}

step_indexing() {
  tests tests/test_layouts.py -k "int32 or 2_31 or device"
}

step_graphs() {
  tests tests/test_determinism.py tests/test_compile.py -k "graph or equal"
}

# Compiling takes torch.compile longer than measuring takes everybody.
measure() {
  bench --device "$DEVICE" --seconds 420 --out "$OUT/$1.json" "${@:2}"
}

step_bench-a() {
  measure bench-a --quick
}

step_bench-b() {
  measure bench-b --group "${GROUP_B:-bandwidth}" --mode layer_norm/forward --mode layer_norm/backward
}

step_bench-c() {
  measure bench-c --group "${GROUP_C:-models}" --without torch.compile \
    --mode layer_norm/forward --mode layer_norm/backward
}

step_bench-d() {
  measure bench-d --group "${GROUP_D:-latency}" --without torch.compile \
    --mode layer_norm/forward --mode layer_norm/both
}

step_tune-forward() {
  bench tune --seconds 420 --dtype bfloat16 --direction forward | tee "$OUT/tune-forward.diff"
}

step_tune-backward() {
  bench tune --seconds 420 --dtype bfloat16 --direction backward | tee "$OUT/tune-backward.diff"
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

export -f bench tests measure fail
failed=()
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
  case $code in
    0)
      touch "$OUT/$step.done"
      echo "== $step: passed in $((SECONDS - start)) s"
      continue
      ;;
    124) why="not done after $LIMIT seconds; run it again" ;;
    *) why="exit code $code" ;;
  esac
  echo "== $step: $why; see $step.log" >&2
  failed+=("$step")
done
((${#failed[@]} == 0)) || fail "failed: ${failed[*]}"
