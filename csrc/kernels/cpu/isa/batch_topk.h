// Top-k of a whole batch: every worker collects candidates for the N k best, above a floor that
// rises with better candidates; the best of all collections are then put into rows.
#pragma once

#include "kernels/cpu/isa/token_block.h"

namespace sae_fast::SAE_FAST_ISA {

// Counts keys by 16 of their bits at a time, so that an order statistic takes two passes over any
// number of lists.
class KeyHistogram {
 public:
  bool allocate() { return memory_.reset(kBins * static_cast<int64_t>(sizeof(int64_t))); }

  // The k-th largest key. `each(add)` calls add(key) for every key, of which there are at least k.
  template <class Each>
  int32_t kth_largest(int64_t k, Each&& each) {
    auto* const bins = memory_.as<int64_t>();
    const uint32_t upper = pick(bins, k, [&](auto&& count) {
      each([&](int32_t key) { count(sortable_bits(key) >> 16); });
    });
    const uint32_t lower = pick(bins, k, [&](auto&& count) {
      each([&](int32_t key) {
        const uint32_t bits = sortable_bits(key);
        if (bits >> 16 == upper) count(bits & 0xffffu);
      });
    });
    return static_cast<int32_t>((upper << 16 | lower) ^ 0x80000000u);
  }

 private:
  static constexpr int64_t kBins = 1 << 16;

  static uint32_t sortable_bits(int32_t key) { return static_cast<uint32_t>(key) ^ 0x80000000u; }

  // The bin of the k-th largest; k becomes its rank within the bin.
  template <class CountAll>
  static uint32_t pick(int64_t* bins, int64_t& k, CountAll&& count_all) {
    std::memset(bins, 0, kBins * sizeof(int64_t));
    count_all([bins](uint32_t bin) { ++bins[bin]; });
    uint32_t bin = kBins - 1;
    for (; bins[bin] < k; --bin) k -= bins[bin];
    return bin;
  }

  Scratch memory_;
};

// A lower limit for candidates that all workers share. It decides how much work is done, never the
// result: whether enough entries reached it is checked at the end.
class BatchFloor {
 public:
  void set(float value) { value_ = value; }
  float value() const {
    float value;
    __atomic_load(&value_, &value, __ATOMIC_RELAXED);
    return value;
  }
  void raise(float to) {
    float now = value();
    while (to > now && !__atomic_compare_exchange(&value_, &now, &to, true, __ATOMIC_RELAXED,
                                                  __ATOMIC_RELAXED)) {
    }
  }

 private:
  float value_ = 0.0f;  // never below 0: only positive values count
};

// The candidates of one worker by token, and within a token by latent, both ascending.
class BatchCandidates {
 public:
  struct Entry {
    int32_t key;  // ordered_key of the value
    float value;
    int32_t token, latent;
  };

  // Room for twice the `wanted` best, so that sorting out pays for itself.
  bool allocate(int64_t wanted, BatchFloor* floor) {
    wanted_ = wanted;
    capacity_ = 2 * wanted;
    floor_ = floor;
    return histogram_.allocate() && memory_.reset(capacity_ * static_cast<int64_t>(sizeof(Entry)));
  }

  void clear() { count_ = 0; }
  int64_t count() const { return count_; }
  const Entry* begin() const { return memory_.as<Entry>(); }
  const Entry* end() const { return begin() + count_; }

  void add(int64_t token, const float* values, const int32_t* latents, int64_t count) {
    float floor = floor_->value();
    for (int64_t i = 0; i < count; ++i) {
      const float value = values[i];
      if (!(value > 0.0f && value >= floor) && !std::isnan(value)) continue;
      if (count_ == capacity_) {
        keep_the_best();
        floor = floor_->value();
      }
      memory_.as<Entry>()[count_++] = {ordered_key(value), value, static_cast<int32_t>(token),
                                       latents[i]};
    }
  }

 private:
  // Drops all but the `wanted` best. Of equal values those that come first in the batch stay.
  void keep_the_best() {
    Entry* const entries = memory_.as<Entry>();
    const int32_t kth = histogram_.kth_largest(wanted_, [&](auto&& add) {
      for (int64_t i = 0; i < count_; ++i) add(entries[i].key);
    });
    int64_t equal = wanted_;
    for (int64_t i = 0; i < count_; ++i) equal -= entries[i].key > kth ? 1 : 0;
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const bool keep = entries[i].key > kth || (entries[i].key == kth && equal-- > 0);
      entries[kept] = entries[i];
      kept += keep ? 1 : 0;
    }
    count_ = kept;
    floor_->raise(kth == kNanKey ? INFINITY : value_of_key(kth));
  }

  Scratch memory_;
  KeyHistogram histogram_;
  BatchFloor* floor_ = nullptr;
  int64_t wanted_ = 0, capacity_ = 0, count_ = 0;
};

// A first floor from the approximate scores of some tokens, spread over the batch.
template <class Product, class T>
class FloorSample {
 public:
  bool allocate(const cpu::TopKProblem& problem, const LatentBounds& bounds) {
    const int64_t d_in = problem.encoder.d_in;
    const int64_t panels = cpu::panels(problem.encoder.d_sae);
    rows_ = problem.tokens < kMostRows ? problem.tokens : kMostRows;
    const int64_t slots = (rows_ + Product::kGroup - 1) / Product::kGroup * Product::kGroup;
    TokenBlock<Product, T> block;
    if (!block.allocate(slots, slots, d_in) || !key_memory_.reset(rows_ * panels * kPanel * 4) ||
        !histogram_.allocate()) {
      return false;
    }
    for (int64_t row = 0; row < rows_; ++row) {
      block.set(row, problem.x + row * problem.tokens / rows_ * d_in, problem.b_dec);
      block.pack(row, row, bounds);
    }
    typename Product::Registers registers;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const auto* sums = block.multiply(registers, rows_, problem.encoder, panel);
      for (int64_t row = 0; row < rows_; ++row) add(problem, bounds, block, panel, row, sums);
    }
    return true;
  }

  // The value that a share `k / d_sae` of the sampled scores reaches; 0 if that is not positive.
  float floor(double k) {
    const auto rank = static_cast<int64_t>(std::ceil(k * static_cast<double>(rows_)));
    if (rank < 1 || rank > count_) return 0.0f;
    const auto* keys = key_memory_.as<int32_t>();
    const int32_t key = histogram_.kth_largest(rank, [&](auto&& add) {
      for (int64_t i = 0; i < count_; ++i) add(keys[i]);
    });
    return value_of_key(key);
  }

 private:
  static constexpr int64_t kMostRows = 48;

  template <class Sum>
  void add(const cpu::TopKProblem& problem, const LatentBounds& bounds,
           const TokenBlock<Product, T>& block, int64_t panel, int64_t row, const Sum* sums) {
    if (!(block.error(row) < INFINITY)) return;
    const int64_t first = panel * kPanel;
    const PanelScores scores = panel_scores<Product>(sums, row, problem.encoder.stats + first,
                                                     block.scale(row), bounds.bias + first);
    float values[kPanel];
    std::memcpy(values, scores.value, sizeof values);
    for (const float value : values) {  // NaN, a latent that is not screened, is not above 0
      if (value > 0.0f) key_memory_.as<int32_t>()[count_++] = ordered_key(value);
    }
  }

  Scratch key_memory_;
  KeyHistogram histogram_;
  int64_t rows_ = 0, count_ = 0;
};

// Puts the `wanted` best of all collections into rows: values [wanted], indices [wanted], offsets
// [tokens + 1]. Where there are fewer, the last row ends in entries of value 0 and latent 0.
class BatchRows {
 public:
  template <class Each>  // each(function) calls function(candidates) for every collection, in turn
  bool find(int64_t tokens, int64_t wanted, int64_t found, Each&& each) {
    wanted_ = wanted;
    tokens_ = tokens;
    if (!histogram_.allocate() || !tie_memory_.reset((tokens + 1) * 8)) return false;
    auto* const ties = tie_memory_.as<int64_t>();
    std::memset(ties, 0, static_cast<size_t>(tokens + 1) * sizeof(int64_t));
    if (found <= wanted) return true;  // everything is in: kth_ is below all keys
    kth_ = histogram_.kth_largest(wanted, [&](auto&& add) {
      each([&](const BatchCandidates& list) {
        for (const auto& entry : list) add(entry.key);
      });
    });
    int64_t open = wanted;  // places for entries equal to the k-th, taken in order
    each([&](const BatchCandidates& list) {
      for (const auto& entry : list) {
        open -= entry.key > kth_ ? 1 : 0;
        ties[entry.token] += entry.key == kth_ ? 1 : 0;
      }
    });
    for (int64_t token = 0; token < tokens; ++token) {
      ties[token] = ties[token] < open ? ties[token] : open;
      open -= ties[token];
    }
    return true;
  }

  template <class Each>
  void write_offsets(int64_t* offsets, Each&& each) const {
    const auto* ties = tie_memory_.as<int64_t>();
    for (int64_t token = 0; token < tokens_; ++token) offsets[token + 1] = ties[token];
    each([&](const BatchCandidates& list) {
      for (const auto& entry : list) offsets[entry.token + 1] += entry.key > kth_ ? 1 : 0;
    });
    offsets[0] = 0;
    for (int64_t token = 0; token < tokens_; ++token) offsets[token + 1] += offsets[token];
  }

  // Writes the entries of one collection; collections have different tokens.
  void write(const BatchCandidates& list, const int64_t* offsets, float* values,
             int32_t* indices) const {
    const auto* ties = tie_memory_.as<int64_t>();
    int64_t token = -1, at = 0, open = 0;
    for (const auto& entry : list) {
      if (entry.token != token) {
        token = entry.token;
        at = offsets[token];
        open = ties[token];
      }
      if (entry.key < kth_ || (entry.key == kth_ && open-- <= 0)) continue;
      values[at] = entry.value;
      indices[at++] = entry.latent;
    }
  }

  // Fills the last row up; called after `write`.
  void pad(int64_t* offsets, float* values, int32_t* indices) const {
    if (tokens_ == 0) return;
    for (int64_t at = offsets[tokens_]; at < wanted_; ++at) {
      values[at] = 0.0f;
      indices[at] = 0;
    }
    offsets[tokens_] = wanted_;
  }

 private:
  KeyHistogram histogram_;
  Scratch tie_memory_;
  int64_t wanted_ = 0, tokens_ = 0;
  int32_t kth_ = INT32_MIN;
};

}  // namespace sae_fast::SAE_FAST_ISA
