// One tile product, on hardware or emulated: tile_case.cpp is compiled for each.
#pragma once

#include <cstdint>

namespace sae_fast::testing {

// sums [16][16] += left [16][32] · right, a pair of columns of each of 16 latents in a row;
// bfloat16.
using MultiplyTile = void (*)(const uint16_t* left, const uint16_t* right, float* sums);

void multiply_tile_emulated(const uint16_t* left, const uint16_t* right, float* sums);
void multiply_tile_on_hardware(const uint16_t* left, const uint16_t* right, float* sums);

// sums [16][16] += left [16][64] · right, four columns of each of 16 rows in a row; signed bytes.
void multiply_bytes_emulated(const int8_t* left, const int8_t* right, int32_t* sums);
void multiply_bytes_on_hardware(const int8_t* left, const int8_t* right, int32_t* sums);

}  // namespace sae_fast::testing
