#!/usr/bin/env bash
# All checks that need a GPU, in one command of at most nine minutes: it builds in place, runs the
# tests on CUDA, the sanitizers, the benchmarks and a profile, and writes all results to one folder.
#
#   benchmarks/gpu.sh --out gpu_results
#   benchmarks/gpu.sh --only tests --only bench --sizes G1,G2
# shellcheck disable=SC2329  # the parts are called by name
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 64
source benchmarks/gpu_parts.sh

usage() {
  cat <<'TEXT'
usage: benchmarks/gpu.sh [options]
  --out DIR       folder of results (default gpu_results): summary.md, tables.md, log.txt,
                  tests.xml, train_step.json, kernels.json, quality.json, profile.json
  --only PART     tests, sanitizer, bench or profile; can be given several times (default: all)
  --sizes LIST    sizes of the benchmark (default G1,G2,G3)
  --seconds N     time limit of all parts together (default 540)
  --no-build      use the module that is already built
  --device cpu    try the script without a GPU: tiny sizes, a few tests, no CUDA tools
  PYTHON=…        the interpreter (default python3), which needs torch
The exit code is the sum over the parts that failed: build 1, tests 2, sanitizer 4, bench 8,
profile 16; it is 64 for wrong arguments.
TEXT
}

refuse() {
  echo "gpu.sh: $1" >&2
  exit 64
}

PYTHON=${PYTHON:-python3}
out=gpu_results
device=cuda
sizes=""
seconds=540
build=yes
chosen=()
while (($#)); do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --no-build) build=no; shift; continue ;;
    --out | --only | --sizes | --seconds | --device) ;;
    *) refuse "unknown argument $1; --help lists them" ;;
  esac
  (($# > 1)) || refuse "$1 needs a value"
  case $1 in
    --out) out=$2 ;;
    --sizes) sizes=$2 ;;
    --seconds) seconds=$2 ;;
    --device) device=$2 ;;
    --only)
      IFS=, read -ra names <<<"$2"
      for name in "${names[@]}"; do
        case $name in
          tests | sanitizer | bench | profile) chosen+=("$name") ;;
          *) refuse "--only must be tests, sanitizer, bench or profile, got $name" ;;
        esac
      done
      ;;
  esac
  shift 2
done
[[ $seconds =~ ^[1-9][0-9]*$ ]] || refuse "--seconds must be a whole number above 0, got $seconds"
[[ $device == cuda || $device == cpu ]] || refuse "--device must be cuda or cpu, got $device"
((${#chosen[@]})) || chosen=(tests sanitizer bench profile)
[[ -n $sizes ]] || { [[ $device == cuda ]] && sizes=G1,G2,G3 || sizes=64x32x128x4; }

mkdir -p "$out" || refuse "cannot make $out"
out=$(cd "$out" && pwd)
rm -f "$out"/{summary,tables}.md "$out"/{train_step,kernels,quality,profile}.json \
  "$out"/{log.txt,tests.xml}
work=$(mktemp -d)
log=$work/log.txt
tables=$work/tables # one Markdown file each, in the order of their names
mkdir "$tables"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# A part's share of the time, in seconds of the default; time left over is given to the later parts.
declare -A share=([build]=130 [tests]=115 [sanitizer]=90 [bench]=145 [profile]=60)
declare -A code=([build]=1 [tests]=2 [sanitizer]=4 [bench]=8 [profile]=16)
parts=()
[[ $build == no ]] || parts+=(build)
for name in tests sanitizer bench profile; do # in this order, whatever the order of the options
  [[ " ${chosen[*]} " == *" $name "* ]] && parts+=("$name")
done
start=$SECONDS
deadline=0   # the running part's, on the clock of SECONDS
failed=0     # how many commands of the running part have failed
exit_code=0
results=()

say() { echo "$*" | tee -a "$log"; }

left() { echo $((deadline - SECONDS)); }

# Runs a command within the rest of its part's time, or within `portion` percent of the rest. A late
# command is ended by an interrupt, which lets Python write the results so far.
limited() {
  local remaining status
  remaining=$(($(left) * ${portion:-100} / 100))
  say "+ $*"
  if ((remaining < 5)); then
    say "gpu.sh: no time left for this"
    failed=$((failed + 1))
    return 1
  fi
  timeout --signal=INT --kill-after=10 "$remaining" "$@" >>"$log" 2>&1
  status=$?
  if ((status)); then
    failed=$((failed + 1))
    ((status != 124 && status != 137)) || say "gpu.sh: stopped after $remaining s"
    say "gpu.sh: exit code $status; the log's end:"
    tail -n 15 "$log" | sed 's/^/    /'
  fi
  return "$status"
}

needs() {
  command -v "$1" >/dev/null && return 0
  say "gpu.sh: $1 is not on the PATH"
  failed=$((failed + 1))
  return 1
}

keep_results() {
  local file
  {
    echo "# Results of gpu.sh"
    echo
    cat "$work/machine.md"
    echo
    echo "| part | result | seconds |"
    echo "|---|---|---:|"
    for file in "${results[@]}"; do echo "$file"; done
  } >"$out/summary.md"
  : >"$out/tables.md"
  for file in "$tables"/*.md; do
    [[ -e $file ]] && { cat "$file"; echo; } >>"$out/tables.md"
  done
  tail -c 12000000 "$log" >"$out/log.txt"
}

run_part() {
  local name=$1 rest=0 began=$SECONDS budget other seen=no
  for other in "${parts[@]}"; do
    [[ $other == "$name" ]] && seen=yes
    [[ $seen == yes ]] && rest=$((rest + share[$other]))
  done
  budget=$(((seconds - (SECONDS - start)) * share[$name] / rest))
  deadline=$((SECONDS + budget))
  failed=0
  say ""
  say "== $name, at most $budget s"
  "part_$name"
  if ((failed)); then
    exit_code=$((exit_code + code[$name]))
    results+=("| $name | **failed** ($failed commands) | $((SECONDS - began)) |")
  else
    results+=("| $name | passed | $((SECONDS - began)) |")
  fi
  say "== $name: ${results[-1]}"
  keep_results
}

part_build() {
  if [[ $device == cpu ]]; then
    limited "$PYTHON" -m sae_fast.info
    return
  fi
  needs nvcc || return
  if ! build_module; then
    failed=0
    say "gpu.sh: pip could not build; trying CMake alone"
    limited cmake -S . -B build/gpu_cmake -G Ninja --log-level=WARNING -DSAE_FAST_CUDA=ON \
      -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DCMAKE_CUDA_COMPILER="$(command -v nvcc)" &&
      limited cmake --build build/gpu_cmake
  fi
  limited "$PYTHON" -c \
    "import sae_fast; i = sae_fast.build_info(); print(i); exit(0 if i.get('cuda') else str(i))"
}

part_tests() {
  local options=(-m cuda)
  if [[ $device == cpu ]]; then
    run_tests python_tests/ops/test_decode.py -m "not cuda"
  else
    # The tests are small and leave the GPU idle most of the time.
    has_xdist && options+=(-n 4 --dist loadfile)
    portion=75 run_tests "${options[@]}" \
      python_tests/ops python_tests/autoencoder python_tests/activations python_tests/training
  fi
  # Latents die and are revived during these trainings, so that AuxK is compared too.
  limited "$PYTHON" -m benchmarks.quality --shard-dir examples/activations --seeds 0 --epochs 10 \
    --lr 3e-3 --dead-after-tokens 30000 --device cpu "$device" --repeat --no-reference \
    --fvu-tolerance 0.01 --threads 8 \
    --json "$out/quality.json" --markdown "$tables/3_quality.md"
}

part_sanitizer() {
  local tool
  if [[ $device == cpu ]]; then
    limited "$PYTHON" python_tests/ops/run_every_op.py --device cpu
    return
  fi
  needs compute-sanitizer || return
  for tool in memcheck racecheck; do
    portion=$([[ $tool == memcheck ]] && echo 50 || echo 100) sanitize_ops "$tool"
  done
}

part_bench() {
  local size number=0 names
  IFS=, read -ra names <<<"$sizes"
  for size in "${names[@]}"; do
    number=$((number + 1))
    # Two thirds of an equal share, because the limit is checked only between implementations.
    portion=$((100 / (${#names[@]} - number + 2) + 10)) \
      time_steps $(($(left) * 2 / 3 / (${#names[@]} - number + 2))) "$size" \
      --markdown "$tables/1_train_step.md"
  done
  time_kernels $(($(left) * 2 / 3)) "$sizes" --rounds 5 --markdown "$tables/2_kernels.md"
}

part_profile() {
  local names size
  IFS=, read -ra names <<<"$sizes"
  size=${names[-1]}
  ((${#names[@]} < 2)) || size=${names[1]}
  portion=50 profile_step "$size" --json "$out/profile.json" --markdown "$tables/4_profile.md" ||
    return
  [[ $device == cuda ]] || return
  needs ncu || return
  count_kernels "$size" 200 \
    "$("$PYTHON" -c "import json, sys; print(json.load(open(sys.argv[1]))['pattern'])" \
      "$out/profile.json")" "$work/ncu.csv"
  [[ -e $work/ncu.csv ]] && cat "$work/ncu.csv" >>"$log"
  limited "$PYTHON" -m benchmarks.profile_step summary --csv "$work/ncu.csv" \
    --slowest "$out/profile.json" --markdown "$tables/5_ncu.md"
}

describe_machine() {
  local commit
  commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
  echo "- $(date -u +%Y-%m-%dT%H:%MZ), commit $commit"
  echo "- $("$PYTHON" -c "import platform, torch
print('Python', platform.python_version() + ', torch', torch.__version__)")"
  [[ $device == cuda ]] || return
  echo "- name, driver, memory, SM clock, its maximum, memory clock:"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem \
    --format=csv,noheader | sed 's/^/  /'
  echo "- $(nvcc --version 2>/dev/null | tail -n 1 || echo "no nvcc")"
}

# Packages that the parts import; a machine without network needs the missing ones as wheels.
missing=$("$PYTHON" - <<'PYTHON'
from importlib.util import find_spec
needed = "torch numpy h5py safetensors tqdm pytest hypothesis pybind11 setuptools"
of_tests = "fsspec tokenizers transformers"
print(*[name for name in (needed + " " + of_tests).split() if find_spec(name) is None])
PYTHON
) || refuse "$PYTHON does not run"
[[ -z $missing ]] || refuse "$PYTHON lacks: $missing; bring their wheels and install them first"
if [[ $device == cuda ]]; then
  "$PYTHON" -c "import torch; exit(0 if torch.cuda.is_available() else 1)" ||
    refuse "torch finds no CUDA device; --device cpu tries the script without one"
fi

describe_machine >"$work/machine.md"
tee -a "$log" <"$work/machine.md"
for part in "${parts[@]}"; do run_part "$part"; done
say ""
say "gpu.sh: $((SECONDS - start)) s, exit code $exit_code, results in $out"
keep_results
cat "$out/summary.md"
rm -rf "$work"
exit "$exit_code"
