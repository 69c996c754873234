#!/usr/bin/env bash
# The first minutes on a GPU, in two parts with time to mend between them: part a builds, runs the
# tests, profiles a step and times short benchmarks, within 340 s; part b repeats tests that failed,
# times the benchmarks and runs ncu and the sanitizers, within 280 s.
#
#   benchmarks/first_light.sh a
#   benchmarks/first_light.sh b python_tests/ops/test_decode.py    with the tests that failed in a
#   benchmarks/first_light.sh a --device cpu                       a rehearsal, with tiny sizes
#
# It writes at most 8 files into $OUT, by default gpu_results: summary.txt has a line for each step.
# The limits of the steps are of an H200 with 16 cores; PERCENT=200 doubles them. Wheels of packages
# that the machine lacks are installed from the folder .whl, where there is one.
# shellcheck disable=SC2329  # the parts are called by name
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 64

refuse() {
  echo "first_light.sh: $1" >&2
  exit 64
}

part=${1:-}
[[ $part == a || $part == b ]] || refuse "the first argument must be a or b, got '$part'"
shift
device=cuda
if [[ ${1:-} == --device ]]; then
  device=${2:-}
  [[ $device == cuda || $device == cpu ]] || refuse "--device must be cuda or cpu, got '$device'"
  shift 2
fi

PYTHON=${PYTHON:-python3}
PERCENT=${PERCENT:-100}
[[ $PERCENT =~ ^[1-9][0-9]*$ ]] || refuse "PERCENT must be a whole number above 0, got $PERCENT"
out=${OUT:-gpu_results}
mkdir -p "$out" || refuse "cannot make $out"
out=$(cd "$out" && pwd)
log=$out/log.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$out/summary.txt"
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
export PYTHONPATH=$work/site:$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0 # steps

allowed() { echo $((($1 * PERCENT + 99) / 100)); }

# step SECONDS NAME COMMAND…: runs a command within its time. A late command is ended by an
# interrupt, which lets Python write the results so far.
step() {
  local limit name=$2 began=$SECONDS status
  limit=$(allowed "$1")
  shift 2
  echo "== $name: $*" >>"$log"
  timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  status=$?
  ((status == 0)) || failed=$((failed + 1))
  echo "$SECONDS s: $name: exit code $status after $((SECONDS - began)) of $limit s" |
    tee -a "$out/summary.txt"
  return "$status"
}

if [[ $device == cuda ]]; then
  profiled=(G1 G2)
  sizes=(G1 G2 G3)
  graphs=sae_fast_graph,sae_fast_graph_bf16
  eager=sae_fast,sae_fast_bf16,$graphs
else
  profiled=(64x32x128x4)
  sizes=(64x32x128x4)
  graphs=sae_fast
  eager=sae_fast,sae_fast_bf16
fi

install_wheels() {
  compgen -G ".whl/*.whl" >/dev/null || return 0
  step 20 wheels "$PYTHON" -m pip install -q --no-index --no-deps --no-compile \
    --target "$work/site" .whl/*.whl
}

build() {
  if [[ $device == cpu ]]; then
    step 20 build "$PYTHON" -m sae_fast.info
    return
  fi
  local architecture
  architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
  [[ $architecture != 9.0 ]] || architecture=9.0a # for wgmma
  TORCH_CUDA_ARCH_LIST=$architecture SAE_FAST_CUDA=1 SAE_FAST_BUILD_DIR=build/gpu step 130 build \
    "$PYTHON" -m pip install -q --no-build-isolation --no-deps --no-index -e . || return
  # Smaller without symbols, so that it can be kept and need not be built again.
  strip -o "$out/module.so" sae_fast/_C*.so >>"$log" 2>&1 || rm -f "$out/module.so"
}

has_module() {
  [[ $device == cpu ]] ||
    "$PYTHON" -c "import sae_fast; exit(0 if sae_fast.build_info()['cuda'] else 1)"
}

tests() { # SECONDS TESTS…
  local limit=$1 options
  shift
  # pytest-benchmark warns beside xdist, and warnings are errors.
  options=(-q -p no:cacheprovider -p no:benchmark --maxfail 60 --junitxml "$out/tests.xml")
  if [[ $device == cpu ]]; then
    options+=(-m "not cuda and not slow")
  else
    options+=(-m cuda -k "not inductor")
    "$PYTHON" -c "import xdist" 2>/dev/null && options+=(-n 8 --dist worksteal)
  fi
  step "$limit" tests "$PYTHON" -m pytest "${options[@]}" "$@"
}

profile() { # SECONDS SIZE PRECISION
  step "$1" "profile $2 $3" "$PYTHON" -m benchmarks.profile_step slowest --device "$device" \
    --size "$2" --precision "$3" --json "$work/profile.json" --markdown "$work/profile.md"
  cat "$work/profile.md" >>"$out/profiles.md" 2>/dev/null
}

bench() { # SECONDS SIZE PEERS OURS
  step "$1" "benchmark $2" "$PYTHON" -m benchmarks.train_step --device "$device" --sizes "$2" \
    --merge --rounds 3 --seconds $(($(allowed "$1") * 3 / 4)) --memory-steps 0 --peers "$3" --ours "$4" \
    --json "$out/train_step.json" --markdown "$out/train_step.md"
}

sanitize() { # SECONDS TOOL
  # Only kernels of this project: instrumenting the libraries' takes minutes.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" "$2" compute-sanitizer --tool "$2" \
    --error-exitcode 9 --kernel-name kernel_substring=sae_fast \
    "$PYTHON" python_tests/ops/run_every_op.py
}

part_a() {
  local size precision
  rm -f "$out"/{train_step.json,train_step.md,profiles.md,tests.xml}
  { nvidia-smi; uname -r; nvcc --version; "$PYTHON" -m pip list; } >>"$log" 2>&1
  build || return
  step 10 info "$PYTHON" -m sae_fast.info
  SAE_FAST_DEBUG_SYNC=1 step 30 "every op" "$PYTHON" python_tests/ops/run_every_op.py \
    --device "$device" || { [[ $device == cpu ]] || sanitize 60 memcheck; }
  if [[ $device == cpu ]]; then
    tests 60 python_tests/ops/test_decode.py
  else
    tests 95 python_tests/ops python_tests/training/test_cuda_graph.py \
      python_tests/training/test_batches.py python_tests/training/test_late_notice.py
  fi
  for size in "${profiled[@]}"; do
    for precision in bf16 screened; do profile 14 "$size" "$precision"; done
  done
  bench 20 "${sizes[0]}" eager_bf16 "$graphs"
  for size in "${sizes[@]:1}"; do bench 22 "$size" "" "$graphs"; done
}

part_b() { # TESTS…
  rm -f "$out"/{train_step.json,train_step.md,kernels.json,ncu.csv,tests.xml}
  has_module >>"$log" 2>&1 || build || return
  (($# == 0)) || tests 40 "$@"
  bench 35 "${sizes[0]}" eager_bf16,gather_bf16,eager "$eager"
  for size in "${sizes[@]:1}"; do bench 40 "$size" eager_bf16 "$graphs"; done
  step 40 kernels "$PYTHON" -m benchmarks.kernels --device "$device" \
    --sizes "$(IFS=,; echo "${profiled[*]}")" --rounds 3 --seconds "$(allowed 32)" --no-reader \
    --json "$out/kernels.json"
  [[ $device == cuda ]] || return
  step 45 ncu ncu --clock-control none --cache-control none --profile-from-start off --csv \
    --page raw --metrics "$("$PYTHON" -m benchmarks.profile_step metrics)" --launch-count 8 \
    --kernel-name 'regex:^(update_kernel|gradient_norm_kernel|reconstruct_kernel|score_kernel|select_kernel)$' \
    --log-file "$out/ncu.csv" "$PYTHON" -m benchmarks.profile_step run --size "${profiled[0]}"
  sanitize 30 memcheck
  sanitize 30 racecheck
}

echo "first_light.sh $part: $(date -u +%Y-%m-%dT%H:%MZ)" >"$log"
install_wheels
"part_$part" "$@"
echo "$SECONDS s: part $part: $failed steps failed" | tee -a "$out/summary.txt"
exit $((failed > 0))
