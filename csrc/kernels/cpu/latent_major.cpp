// The latent-major view of a code, made by a counting sort, and what is read through it. Compiled
// once for all instruction sets.
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

// Calls function(first, end) for ranges of kPart that cover [0, count).
constexpr int64_t kPart = 1 << 14;
template <class Function>
void for_each_part(int64_t count, const Parallel& parallel, Function&& function) {
  parallel.for_each((count + kPart - 1) / kPart, [&](int64_t part) {
    const int64_t end = (part + 1) * kPart;
    function(part * kPart, end < count ? end : count);
  });
}

}  // namespace

int64_t count_active(const Code& code, int64_t entries) {
  int64_t active = 0;
  for (int64_t entry = 0; entry < entries; ++entry) active += code.values[entry] != 0.0f ? 1 : 0;
  return active;
}

void sort_by_latent(const Code& code, int64_t d_sae, int64_t* offsets, int32_t* entries,
                    int32_t* rows, const Parallel& parallel) {
  // Every thread counts and places some of the tokens; threads are ordered, so the sort is stable.
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

bool in_range(const int32_t* numbers, int64_t count, int64_t bound, const Parallel& parallel) {
  std::vector<char> wrong(static_cast<size_t>((count + kPart - 1) / kPart), 0);
  for_each_part(count, parallel, [&](int64_t first, int64_t end) {
    uint32_t largest = 0;  // a negative number is above every bound
    for (int64_t i = first; i < end; ++i) {
      const auto number = static_cast<uint32_t>(numbers[i]);
      largest = largest > number ? largest : number;
    }
    wrong[static_cast<size_t>(first / kPart)] = static_cast<int64_t>(largest) >= bound ? 1 : 0;
  });
  for (const char part : wrong) {
    if (part != 0) return false;
  }
  return true;
}

void gather_entries(const float* source, const int32_t* entries, int64_t count, float* to,
                    const Parallel& parallel) {
  for_each_part(count, parallel, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) to[i] = source[entries[i]];
  });
}

void latent_sums(const int64_t* offsets, int64_t d_sae, const int32_t* entries, const float* source,
                 float* sums, const Parallel& parallel) {
  constexpr int64_t kLatents = 256;  // few enough that a busy one does not hold up the rest
  parallel.for_each((d_sae + kLatents - 1) / kLatents, [&](int64_t part) {
    const int64_t end = (part + 1) * kLatents < d_sae ? (part + 1) * kLatents : d_sae;
    for (int64_t latent = part * kLatents; latent < end; ++latent) {
      float sum = 0.0f;
      for (int64_t i = offsets[latent]; i < offsets[latent + 1]; ++i) sum += source[entries[i]];
      sums[latent] = sum;
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
