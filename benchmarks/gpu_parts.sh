# The commands that gpu.sh and first_light.sh have in common. Both source this file, set PYTHON,
# device and out, and define `limited`, which runs a command within the time that it is given.
# shellcheck shell=bash disable=SC2154

export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

# Build the module in place for the GPU of this machine.
build_module() {
  local architecture
  architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
  [[ $architecture != 9.0 ]] || architecture=9.0a # for wgmma
  export TORCH_CUDA_ARCH_LIST=$architecture
  SAE_FAST_CUDA=1 SAE_FAST_BUILD_DIR=build/gpu limited "$PYTHON" -m pip install -q \
    --no-build-isolation --no-deps --no-index --disable-pip-version-check -e .
}

run_tests() { # ARGUMENTS of pytest…
  # pytest-benchmark warns beside xdist, and warnings are errors.
  limited "$PYTHON" -m pytest -q -p no:cacheprovider -p no:benchmark --junitxml "$out/tests.xml" "$@"
}

has_xdist() { "$PYTHON" -c "import xdist" 2>/dev/null; }

# Time steps of one size, which are added to train_step.json.
time_steps() { # SECONDS SIZE OPTIONS…
  limited "$PYTHON" -m benchmarks.train_step --device "$device" --sizes "$2" --merge \
    --seconds "$1" --memory-steps 0 --json "$out/train_step.json" "${@:3}"
}

# Time the ops at the two smallest of the sizes, which suffice for them.
time_kernels() { # SECONDS SIZES OPTIONS…
  local sizes
  IFS=, read -ra sizes <<<"$2"
  limited "$PYTHON" -m benchmarks.kernels --device "$device" \
    --sizes "$(IFS=, && echo "${sizes[*]:0:2}")" --seconds "$1" --no-reader \
    --json "$out/kernels.json" "${@:3}"
}

# Find the slowest kernels of a step.
profile_step() { # SIZE OPTIONS…
  limited "$PYTHON" -m benchmarks.profile_step slowest --device "$device" --size "$1" "${@:2}"
}

# Measure kernels whose names match a pattern; the caches stay as a step leaves them.
count_kernels() { # SIZE LAUNCHES PATTERN FILE
  limited ncu --clock-control none --cache-control none --profile-from-start off --csv --page raw \
    --metrics "$("$PYTHON" -m benchmarks.profile_step metrics)" --launch-count "$2" \
    --kernel-name "regex:$3" --log-file "$4" \
    "$PYTHON" -m benchmarks.profile_step run --device "$device" --size "$1"
}

# Call every op under a tool of compute-sanitizer.
sanitize_ops() { # TOOL
  # Only kernels of this project: instrumenting the libraries' takes minutes.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited compute-sanitizer --tool "$1" --error-exitcode 9 \
    --kernel-name kernel_substring=sae_fast "$PYTHON" python_tests/ops/run_every_op.py --device "$device"
}
