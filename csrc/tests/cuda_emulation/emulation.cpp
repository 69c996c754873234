#include "tests/cuda_emulation/emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated_cuda {

Device device;

namespace {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 256 * 1024;

struct Barrier {
  unsigned arrived = 0;
  uint64_t passed = 0;
};

using Place = std::array<void*, 5>;  // of __builtin_setjmp

struct Fiber {
  Place place{};
  std::vector<char> stack;  // empty before its first turn
  Barrier* waits_for = nullptr;
  uint64_t passed_before = 0;
  bool finished = false;
};

struct Warp {
  Barrier barrier;
  std::array<uint64_t, kWarpSize> slots{};
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<uint64_t> shared_memory;
Barrier barrier_of_block;
unsigned running = 0;  // threads of the block that have not returned
unsigned current = 0;
Place scheduler;
const std::function<void()>* kernel_body = nullptr;
std::mt19937 order(1);

// The two functions below change the stack. swapcontext would make two system calls each time, and
// AddressSanitizer would clear its record of the whole stack.
[[noreturn, gnu::noinline, gnu::no_sanitize_address]] void jump(Place& to) {
  __builtin_longjmp(to.data(), 1);
}

[[gnu::noinline, gnu::no_sanitize_address]] void end_turn(Fiber& fiber) {
  if (__builtin_setjmp(fiber.place.data()) == 0) jump(scheduler);
}

void pass_if_complete(Barrier& barrier, unsigned needed) {
  if (barrier.arrived == 0 || barrier.arrived < needed) return;
  barrier.arrived = 0;
  ++barrier.passed;
}

void wait_at(Barrier& barrier, unsigned needed) {
  Fiber& fiber = fibers[current];
  fiber.waits_for = &barrier;
  fiber.passed_before = barrier.passed;
  ++barrier.arrived;
  pass_if_complete(barrier, needed);
  while (barrier.passed == fiber.passed_before) end_turn(fiber);
  fiber.waits_for = nullptr;
}

bool waits(const Fiber& fiber) {
  return fiber.waits_for != nullptr && fiber.waits_for->passed == fiber.passed_before;
}

void fiber_main() {
  for (;;) {  // a turn behind the end begins with the next block
    (*kernel_body)();
    fibers[current].finished = true;
    end_turn(fibers[current]);
  }
}

// Starts a fiber on a stack of its own.
[[noreturn]] void start(Fiber& fiber) {
  fiber.stack.resize(kStackBytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = fiber.stack.size();
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
  std::abort();
}

// Gives a fiber its turn.
[[gnu::noinline, gnu::no_sanitize_address]] void take_turn(Fiber& fiber) {
  if (__builtin_setjmp(scheduler.data()) != 0) return;
  if (fiber.stack.empty()) start(fiber);
  jump(fiber.place);
}

void start_block(unsigned threads) {
  if (fibers.size() < threads) fibers.resize(threads);
  warps.assign(threads / kWarpSize, Warp{});
  barrier_of_block = Barrier{};
  running = threads;
  for (unsigned thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[thread];
    fiber.finished = false;
    fiber.waits_for = nullptr;
  }
}

// Runs each thread that does not wait for one turn, except the threads of `held_warp`; returns
// true if at least one ran.
bool take_turns(std::vector<unsigned>& threads, unsigned held_warp) {
  std::shuffle(threads.begin(), threads.end(), order);
  bool progress = false;
  for (const unsigned thread : threads) {
    if (fibers[thread].finished || waits(fibers[thread])) continue;
    if (thread / kWarpSize == held_warp) continue;
    progress = true;
    current = thread;
    threadIdx = dim3(thread, 0, 0);
    take_turn(fibers[thread]);
    if (!fibers[thread].finished) continue;
    --running;
    pass_if_complete(barrier_of_block, running);  // as the hardware counts those that returned
  }
  return progress;
}

// Runs the block's threads until all have returned. One warp at a time is held back, so that the
// others get ahead of it as far as barriers let them.
void run_block(unsigned threads) {
  start_block(threads);
  std::vector<unsigned> all(threads);
  for (unsigned thread = 0; thread < threads; ++thread) all[thread] = thread;
  const unsigned no_warp = threads / kWarpSize;
  unsigned held_warp = order() % (no_warp + 1);
  while (running > 0) {
    if (take_turns(all, held_warp)) continue;
    if (held_warp == no_warp) {
      std::fprintf(stderr, "block %u: %u threads wait at barriers that others never reach\n",
                   blockIdx.x, running);
      std::abort();
    }
    held_warp = no_warp;
    if (take_turns(all, held_warp)) held_warp = order() % (no_warp + 1);
  }
}

}  // namespace

Nodes nodes;

std::map<const void*, size_t>& allowed_shared_bytes() {
  static std::map<const void*, size_t> bytes;
  return bytes;
}

size_t shared_limit(const void* kernel) {
  constexpr size_t kWithoutPermission = 48 * 1024, kDeclared = 1024;
  const auto found = allowed_shared_bytes().find(kernel);
  return found == allowed_shared_bytes().end() ? kWithoutPermission - kDeclared : found->second;
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  if (block.x == 0 || block.x > 1024 || block.x % kWarpSize != 0 || grid.x == 0) {
    std::fprintf(stderr, "a launch of %u blocks of %u threads\n", grid.x, block.x);
    std::abort();
  }
  kernel_body = &kernel;
  blockDim = block;
  gridDim = dim3(std::min(grid.x, device.max_blocks));
  for (unsigned index = 0; index < gridDim.x; ++index) {
    blockIdx = dim3(index, 0, 0);
    // Not zero, since a device's shared memory is not; and of its own size, for AddressSanitizer.
    shared_memory.clear();
    shared_memory.shrink_to_fit();
    shared_memory.assign((shared_bytes + 7) / 8, 0xfbfbfbfbfbfbfbfbu);
    run_block(block.x);
  }
}

void* dynamic_shared_memory() { return shared_memory.data(); }

void block_barrier() { wait_at(barrier_of_block, running); }

void warp_barrier() { wait_at(warps[threadIdx.x / kWarpSize].barrier, kWarpSize); }

uint64_t& shuffle_slot(unsigned lane) { return warps[threadIdx.x / kWarpSize].slots[lane]; }

}  // namespace emulated_cuda
