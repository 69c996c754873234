// Slabs: the work on a block of tokens cut into strips of columns that stay in L2, latent by
// latent. A latent's row is then fetched once for all tokens of the block, and the tokens are at
// hand. On processors whose L3 answers slowly this is several times faster than gathering whole
// rows token by token. Sums run over latents in ascending order whatever the block, so bits do not
// depend on it.
#pragma once

#include "kernels/cpu/decode.h"
#include "kernels/cpu/isa/gather.h"

namespace sae_fast::SAE_FAST_ISA {

constexpr int kSlabVectors = 8;
constexpr int kSlab = kSlabVectors * kLanes;  // columns

struct SlabRow {
  Vec value[kSlabVectors];
};

// Columns [column, column + kSlab) of a row of d_in, zeros past its end.
template <class T>
inline SlabRow load_slab(const T* row, int64_t column, int64_t d_in) {
  SlabRow slab;
  if (column + kSlab <= d_in) {
    SAE_FAST_UNROLL
    for (int v = 0; v < kSlabVectors; ++v) slab.value[v] = load(row + column + v * kLanes);
    return slab;
  }
  T padded[kSlab] = {};
  std::memcpy(padded, row + column, static_cast<size_t>(d_in - column) * sizeof(T));
  SAE_FAST_UNROLL
  for (int v = 0; v < kSlabVectors; ++v) slab.value[v] = load(padded + v * kLanes);
  return slab;
}

// An entry of a block: its token within the block, its flat position in the code, its value, and
// room for its dot product: scattering that once beats adding to the far end slab by slab.
struct BlockEntry {
  int32_t row;
  int32_t entry;
  float value;
  float dot;
};

// The entries of a block of tokens, latent by latent.
class BlockLists {
 public:
  int32_t* offsets = nullptr;  // [d_sae + 1]
  BlockEntry* entries = nullptr;

  static int64_t bytes(int64_t d_sae, int64_t entries) {
    return (d_sae + 2 + 16) * 4 + entries * static_cast<int64_t>(sizeof(BlockEntry));
  }

  void place(char* memory, int64_t d_sae) {
    offsets = reinterpret_cast<int32_t*>(memory);
    entries = reinterpret_cast<BlockEntry*>(offsets + d_sae + 2);
  }

  void sort(const cpu::Code& code, int64_t first, int64_t end, int64_t d_sae) {
    // Shifted by one, so that filling leaves offsets[j] at the start of latent j.
    std::memset(offsets, 0, static_cast<size_t>(d_sae + 2) * sizeof(int32_t));
    for (int64_t i = code.begin(first); i < code.begin(end); ++i) ++offsets[code.indices[i] + 2];
    for (int64_t j = 1; j <= d_sae; ++j) offsets[j + 1] += offsets[j];
    for (int64_t token = first; token < end; ++token) {
      const auto row = static_cast<int32_t>(token - first);
      for (int64_t i = code.begin(token); i < code.end(token); ++i) {
        entries[offsets[code.indices[i] + 1]++] = {row, static_cast<int32_t>(i), code.values[i],
                                                   0.0f};
      }
    }
  }
};

// Reconstruction of a block of tokens, one slab after another.
template <class T>
class SlabReconstruction {
 public:
  static int64_t bytes(int64_t rows, int64_t d_sae, int64_t entries) {
    return rows * kSlab * 4 + BlockLists::bytes(d_sae, entries) + 64;
  }

  SlabReconstruction(const cpu::Code& code, const cpu::Decoder& decoder, int64_t d_sae,
                     const cpu::Reconstruction& to, char* memory, int64_t rows)
      : code_(code), decoder_(decoder), d_sae_(d_sae), to_(to) {
    slab_ = reinterpret_cast<float*>(memory);
    lists_.place(memory + rows * kSlab * 4, d_sae);
  }

  void run(int64_t first, int64_t end) {
    first_ = first;
    rows_ = end - first;
    lists_.sort(code_, first, end, d_sae_);
    for (int64_t column = 0; column < decoder_.d_in; column += kSlab) {
      start(column);
      each_latent(column, [this](const SlabRow& weight, BlockEntry& entry) {
        float* to = slab_ + entry.row * kSlab;
        const Vec value = broadcast(entry.value);
        SAE_FAST_UNROLL
        for (int v = 0; v < kSlabVectors; ++v) {
          store(to + v * kLanes, load(to + v * kLanes) + value * weight.value[v]);
        }
      });
      subtract_target(column);
      each_latent(column, [this](const SlabRow& weight, BlockEntry& entry) {
        const float* from = slab_ + entry.row * kSlab;
        Vec sum[2] = {};
        SAE_FAST_UNROLL
        for (int v = 0; v < kSlabVectors; ++v)
          sum[v % 2] += load(from + v * kLanes) * weight.value[v];
        entry.dot += reduce_add(sum[0] + sum[1]);
      });
    }
    for (int32_t i = 0; i < lists_.offsets[d_sae_]; ++i) {
      to_.residual_dot[lists_.entries[i].entry] = lists_.entries[i].dot;
    }
  }

 private:
  void start(int64_t column) {
    SlabRow bias = {};
    if (decoder_.b_dec != nullptr) bias = load_slab(decoder_.b_dec, column, decoder_.d_in);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int v = 0; v < kSlabVectors; ++v) {
        store(slab_ + row * kSlab + v * kLanes, bias.value[v]);
      }
    }
  }

  template <class Function>
  void each_latent(int64_t column, Function&& function) {
    const auto* W_dec = static_cast<const T*>(decoder_.W_dec);
    const int64_t d_in = decoder_.d_in;
    const int64_t width = (d_in - column < kSlab ? d_in - column : kSlab);
    for (int64_t latent = 0; latent < d_sae_; ++latent) {
      constexpr int64_t kAhead = 4;
      if (latent + kAhead < d_sae_ &&
          lists_.offsets[latent + kAhead] != lists_.offsets[latent + kAhead + 1]) {
        prefetch_row(W_dec + (latent + kAhead) * d_in + column,
                     width * static_cast<int64_t>(sizeof(T)));
      }
      if (lists_.offsets[latent] == lists_.offsets[latent + 1]) continue;
      const SlabRow weight = load_slab(W_dec + latent * d_in, column, d_in);
      for (int32_t i = lists_.offsets[latent]; i < lists_.offsets[latent + 1]; ++i) {
        function(weight, lists_.entries[i]);
      }
    }
  }

  // The slab becomes the residual; its squares and its rows go out.
  void subtract_target(int64_t column) {
    const int64_t d_in = decoder_.d_in;
    const int64_t width = d_in - column < kSlab ? d_in - column : kSlab;
    for (int64_t row = 0; row < rows_; ++row) {
      float* slab = slab_ + row * kSlab;
      const int64_t token = first_ + row;
      const SlabRow target = load_slab(to_.x + token * d_in, column, d_in);
      Vec squares = {};
      SAE_FAST_UNROLL
      for (int v = 0; v < kSlabVectors; ++v) {
        const Vec residual = load(slab + v * kLanes) - target.value[v];
        squares += residual * residual;
        store(slab + v * kLanes, residual);
      }
      float& total = to_.squared_error[token];
      total = column == 0 ? reduce_add(squares) : total + reduce_add(squares);
      store_rounded(static_cast<T*>(to_.residual) + token * d_in + column, slab, width);
    }
  }

  const cpu::Code& code_;
  const cpu::Decoder& decoder_;
  int64_t d_sae_;
  const cpu::Reconstruction& to_;
  float* slab_ = nullptr;  // [rows][kSlab]
  BlockLists lists_;
  int64_t first_ = 0, rows_ = 0;
};

// Whether a batch repeats latents often enough for slabs to win over whole rows: measured, whole
// rows are still ahead at 43 entries a latent and a fifth behind at 64. From shapes alone, so that
// a result never depends on how the work was shared out.
inline bool slabs_pay(int64_t entries, int64_t d_sae) { return entries >= 48 * d_sae; }

}  // namespace sae_fast::SAE_FAST_ISA
