// The tile operations of AMX that the products use: eight registers of 16 rows of 64 bytes. They
// run on hardware or, with SAE_FAST_EMULATE_TILES, in memory with the same bits, so that every
// processor can test the kernels that use them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/common/half.h"

namespace sae_fast::SAE_FAST_ISA {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;

#if defined(SAE_FAST_EMULATE_TILES)

// TDPBF16PS as the manual defines it: for each sum, the 16 even and the 16 odd products of a row
// run in two chains of fused multiply-adds from zero, the chains are added, and their sum is added
// to the tile. Every step rounds to nearest even; subnormal inputs count as zero, and subnormal
// results become zero, whatever MXCSR says.
class Tiles {
 public:
  Tiles() { std::memset(tile_, 0, sizeof tile_); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void zero() {
    std::memset(tile_[kTile], 0, kTileBytes);
  }
  template <int kTile>
  void load(const void* from) {
    std::memcpy(tile_[kTile], from, kTileBytes);
  }
  template <int kTile>
  void load_streamed(const void* from) {
    load<kTile>(from);
  }
  template <int kTile>
  void store(void* to) const {
    std::memcpy(to, tile_[kTile], kTileBytes);
  }
  template <int kSums, int kLeft, int kRight>
  void multiply_bfloat16() {
    float sums[kTileRows][kTileRows];
    BFloat16 left[kTileRows][2 * kTileRows], right[kTileRows][2 * kTileRows];
    std::memcpy(sums, tile_[kSums], sizeof sums);
    std::memcpy(left, tile_[kLeft], sizeof left);
    std::memcpy(right, tile_[kRight], sizeof right);
    for (int m = 0; m < kTileRows; ++m) {
      for (int n = 0; n < kTileRows; ++n) {
        float chain[2] = {};
        for (int pair = 0; pair < kTileRows; ++pair) {
          for (int odd = 0; odd < 2; ++odd) {
            chain[odd] = flush(std::fma(flush(to_float(left[m][2 * pair + odd])),
                                        flush(to_float(right[pair][2 * n + odd])), chain[odd]));
          }
        }
        sums[m][n] = flush(flush(sums[m][n]) + flush(chain[0] + chain[1]));
      }
    }
    std::memcpy(tile_[kSums], sums, sizeof sums);
  }
  // TDPBSSD: sums of products of signed bytes, which wrap round.
  template <int kSums, int kLeft, int kRight>
  void multiply_int8() {
    uint32_t sums[kTileRows][kTileRows];
    int8_t left[kTileRows][kTileRowBytes], right[kTileRows][kTileRowBytes];
    std::memcpy(sums, tile_[kSums], sizeof sums);
    std::memcpy(left, tile_[kLeft], sizeof left);
    std::memcpy(right, tile_[kRight], sizeof right);
    for (int m = 0; m < kTileRows; ++m) {
      for (int n = 0; n < kTileRows; ++n) {
        int32_t sum = 0;
        for (int k = 0; k < kTileRowBytes; ++k) sum += left[m][k] * right[k / 4][4 * n + k % 4];
        sums[m][n] += static_cast<uint32_t>(sum);
      }
    }
    std::memcpy(tile_[kSums], sums, sizeof sums);
  }

 private:
  static float flush(float value) {  // a NaN stays
    return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
  }

  alignas(64) char tile_[8][kTileBytes];
};

#else

// The tile registers of the calling thread, for as long as the object lives: others, such as the
// library behind torch's matrix products, may have shaped them before, and registers that are not
// released are saved at every switch of threads.
//
// Assembly, because GCC's intrinsics are macros that paste the number of a register, which can then
// be no template parameter, and because its loads do not say which memory they read.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = kTileRowBytes;
      shapes.rows[tile] = kTileRows;
    }
    static_assert(sizeof shapes == 64);
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  void load(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(from), "r"(int64_t{kTileRowBytes}), "i"(kTile), "m"(tile_at(from)));
  }
  // Loads with the hint to read from L2: the tile displaces nothing in L1.
  template <int kTile>
  void load_streamed(const void* from) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(from), "r"(int64_t{kTileRowBytes}), "i"(kTile), "m"(tile_at(from)));
  }
  template <int kTile>
  void store(void* to) const {
    asm volatile("tilestored %%tmm%c3, (%1,%2,1)"
                 : "=m"(*static_cast<Bytes*>(to))
                 : "r"(to), "r"(int64_t{kTileRowBytes}), "i"(kTile));
  }
  template <int kSums, int kLeft, int kRight>
  void multiply_bfloat16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
  }
  template <int kSums, int kLeft, int kRight>
  void multiply_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
  }

 private:
  using Bytes = char[kTileBytes];
  static const Bytes& tile_at(const void* from) { return *static_cast<const Bytes*>(from); }
};

#endif

}  // namespace sae_fast::SAE_FAST_ISA
