// One tile product, on hardware or emulated: tile_case.cpp is compiled for each.
#pragma once

#include <cstdint>

namespace sae_fast::testing {

// sums [16][16] += left [16][32] · right, a pair of columns of each of 16 latents in a row;
// bfloat16.
using MultiplyTile = void (*)(const uint16_t* left, const uint16_t* right, float* sums);

void multiply_tile_emulated(const uint16_t* left, const uint16_t* right, float* sums);
void multiply_tile_on_hardware(const uint16_t* left, const uint16_t* right, float* sums);

}  // namespace sae_fast::testing
