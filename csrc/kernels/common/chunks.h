// The division of the latents' entries among thread blocks, and the room that it takes.
// Only the device knows how many entries each latent has: the bounds hold for any numbers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/common/host_device.h"

namespace sae_fast {

// Latents with more entries than this are summed in chunks of this many.
constexpr int64_t kChunkEntries = 128;

// A latent's chunks; none where one block sums it in one go.
SAE_FAST_HOST_DEVICE constexpr int64_t chunks_in(int64_t entries) {
  return entries > kChunkEntries ? (entries + kChunkEntries - 1) / kChunkEntries : 0;
}

// All latents' chunks together are no more: from kChunkEntries + 1 entries on,
// ceil(c / kChunkEntries) <= 2 c / (kChunkEntries + 1), with equality at the first.
constexpr int64_t max_chunks(int64_t entries) { return 2 * entries / (kChunkEntries + 1); }

// The sums that one pass over the latents keeps for the next pass, which computes the others again:
// sums of more than `above` entries, at most `rows` of them.
struct RowCache {
  int64_t above;
  int64_t rows;
};

// Reading a few rows again costs no more than writing their sum and reading it back. The kept sums
// stay below two a token, as long as sums in chunks are kept: the next pass would add their entries
// in another order, and in one thread block.
inline RowCache plan_row_cache(int64_t entries, int64_t tokens) {
  constexpr int64_t kFewEntries = 16;
  constexpr int64_t kRowsPerToken = 2;
  const int64_t most_rows = std::max<int64_t>(kRowsPerToken * tokens, 1);
  const int64_t above = std::clamp(entries / most_rows, kFewEntries, kChunkEntries);
  return {above, entries / (above + 1)};
}

}  // namespace sae_fast
