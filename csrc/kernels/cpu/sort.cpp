// The latent-major view of a code: a counting sort, the same at every instruction set.
#include <vector>

#include "kernels/cpu/dispatch.h"

namespace sae_fast::cpu {
namespace {

// Calls function(entry, token) for the entries of tokens [first, end) whose value is not 0.
template <class Function>
void each_active(const Code& code, int64_t first, int64_t end, Function&& function) {
  for (int64_t token = first; token < end; ++token) {
    for (int64_t entry = code.begin(token); entry < code.end(token); ++entry) {
      if (code.values[entry] != 0.0f) function(entry, token);  // NaN != 0 holds
    }
  }
}

}  // namespace

int64_t count_active(const Code& code, int64_t entries) {
  int64_t active = 0;
  for (int64_t entry = 0; entry < entries; ++entry) active += code.values[entry] != 0.0f ? 1 : 0;
  return active;
}

void sort_by_latent(const Code& code, int64_t d_sae, int64_t* offsets, int32_t* entries,
                    int32_t* rows, const Parallel& parallel) {
  // Every thread counts and places its own tokens; threads are ordered, so the sort is stable.
  const int64_t threads = code.tokens < parallel.threads() ? code.tokens : parallel.threads();
  const auto bound = [&](int64_t thread) { return code.tokens * thread / threads; };
  std::vector<int64_t> places(static_cast<size_t>(threads * d_sae), 0);
  parallel.for_each(threads, [&](int64_t thread) {
    int64_t* own = places.data() + thread * d_sae;
    each_active(code, bound(thread), bound(thread + 1),
                [&](int64_t entry, int64_t) { ++own[code.indices[entry]]; });
  });
  int64_t total = 0;
  for (int64_t latent = 0; latent < d_sae; ++latent) {
    offsets[latent] = total;
    for (int64_t thread = 0; thread < threads; ++thread) {
      int64_t& place = places[static_cast<size_t>(thread * d_sae + latent)];
      const int64_t count = place;
      place = total;
      total += count;
    }
  }
  offsets[d_sae] = total;
  parallel.for_each(threads, [&](int64_t thread) {
    int64_t* own = places.data() + thread * d_sae;
    each_active(code, bound(thread), bound(thread + 1), [&](int64_t entry, int64_t token) {
      const int64_t place = own[code.indices[entry]]++;
      entries[place] = static_cast<int32_t>(entry);
      if (code.offsets != nullptr) rows[place] = static_cast<int32_t>(token);
    });
  });
  if (code.offsets != nullptr) return;
  // With k entries a token a division costs less than a second scattered store.
  parallel.for_each(threads, [&](int64_t thread) {
    const auto k = static_cast<uint32_t>(code.k);
    for (int64_t i = total * thread / threads; i < total * (thread + 1) / threads; ++i) {
      rows[i] = static_cast<int32_t>(static_cast<uint32_t>(entries[i]) / k);
    }
  });
}

int64_t plan_cache(const int64_t* offsets, int64_t d_sae, int64_t budget, int32_t* slots) {
  // The shortest list worth keeping, so that no more than `budget` are: lists by length first.
  constexpr int64_t kLongest = 4096;
  std::vector<int64_t> of_length(kLongest + 1, 0);
  const auto length = [&](int64_t latent) {
    const int64_t count = offsets[latent + 1] - offsets[latent];
    return count < kLongest ? count : kLongest;
  };
  for (int64_t latent = 0; latent < d_sae; ++latent)
    ++of_length[static_cast<size_t>(length(latent))];
  int64_t shortest = kLongest + 1;
  int64_t kept = 0;
  while (shortest > 1 && kept + of_length[static_cast<size_t>(shortest - 1)] <= budget) {
    kept += of_length[static_cast<size_t>(--shortest)];
  }
  int32_t next = 0;
  for (int64_t latent = 0; latent < d_sae; ++latent) {
    slots[latent] = length(latent) >= shortest ? next++ : -1;
  }
  return kept;
}

}  // namespace sae_fast::cpu
