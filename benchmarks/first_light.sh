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
source benchmarks/gpu_parts.sh

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
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
export PYTHONPATH=$work/site:$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0 # steps

allowed() { echo $((($1 * PERCENT + 99) / 100)); }

# step SECONDS NAME FUNCTION…: calls a function that runs a command by `limited`.
step() {
  local limit name=$2 began=$SECONDS status
  limit=$(allowed "$1")
  "${@:3}"
  status=$?
  ((status == 0)) || failed=$((failed + 1))
  echo "$SECONDS s: $name: exit code $status after $((SECONDS - began)) of $limit s" |
    tee -a "$out/summary.txt"
  return "$status"
}

# Runs a command within the time of the step. A late command is ended by an interrupt, which lets
# Python write the results so far.
limited() {
  echo "== $name: $*" >>"$log"
  timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$log" 2>&1
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
  step 20 wheels limited "$PYTHON" -m pip install -q --no-index --no-deps --no-compile \
    --target "$work/site" .whl/*.whl
}

build() {
  if [[ $device == cpu ]]; then
    step 20 build limited "$PYTHON" -m sae_fast.info
    return
  fi
  step 130 build build_module || return
  # Smaller without symbols, so that it can be kept and need not be built again.
  strip -o "$out/module.so" sae_fast/_C*.so >>"$log" 2>&1 || rm -f "$out/module.so"
}

has_module() {
  [[ $device == cpu ]] ||
    "$PYTHON" -c "import sae_fast; exit(0 if sae_fast.build_info()['cuda'] else 1)"
}

tests() { # SECONDS TESTS…
  local limit=$1 options=(--maxfail 60)
  shift
  if [[ $device == cpu ]]; then
    options+=(-m "not cuda and not slow")
  else
    options+=(-m cuda -k "not inductor")
    has_xdist && options+=(-n 8 --dist worksteal)
  fi
  step "$limit" tests run_tests "${options[@]}" "$@"
}

profile() { # SECONDS SIZE PRECISION
  step "$1" "profile $2 $3" profile_step "$2" --precision "$3" --json "$work/profile.json" \
    --markdown "$work/profile.md"
  cat "$work/profile.md" >>"$out/profiles.md" 2>/dev/null
}

bench() { # SECONDS SIZE PEERS OURS
  step "$1" "benchmark $2" time_steps $(($(allowed "$1") * 3 / 4)) "$2" --rounds 3 \
    --peers "$3" --ours "$4" --markdown "$out/train_step.md"
}

sanitize() { step "$1" "$2" sanitize_ops "$2"; } # SECONDS TOOL

part_a() {
  local size precision
  rm -f "$out"/{train_step.json,train_step.md,profiles.md,tests.xml}
  { nvidia-smi; uname -r; nvcc --version; "$PYTHON" -m pip list; } >>"$log" 2>&1
  build || return
  step 10 info limited "$PYTHON" -m sae_fast.info
  SAE_FAST_DEBUG_SYNC=1 step 30 "every op" limited "$PYTHON" python_tests/ops/run_every_op.py \
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
  step 40 kernels time_kernels "$(allowed 32)" "$(IFS=, && echo "${profiled[*]}")" --rounds 3
  [[ $device == cuda ]] || return
  step 45 ncu count_kernels "${profiled[0]}" 8 \
    '^(update_kernel|gradient_norm_kernel|reconstruct_kernel|score_kernel|select_kernel)$' \
    "$out/ncu.csv"
  sanitize 30 memcheck
  sanitize 30 racecheck
}

echo "first_light.sh $part: $(date -u +%Y-%m-%dT%H:%MZ)" >"$log"
install_wheels
"part_$part" "$@"
echo "$SECONDS s: part $part: $failed steps failed" | tee -a "$out/summary.txt"
exit $((failed > 0))
