#include "tests/tile_case.h"

#include "kernels/cpu/isa/tiles.h"

#if defined(SAE_FAST_EMULATE_TILES)
#define SAE_FAST_PLACE(name) name##_emulated
#else
#define SAE_FAST_PLACE(name) name##_on_hardware
#endif

namespace sae_fast::testing {

void SAE_FAST_PLACE(multiply_tile)(const uint16_t* left, const uint16_t* right, float* sums) {
  SAE_FAST_ISA::Tiles tiles;
  tiles.load<0>(sums);
  tiles.load<1>(left);
  tiles.load<2>(right);
  tiles.multiply_bfloat16<0, 1, 2>();
  tiles.store<0>(sums);
}

void SAE_FAST_PLACE(multiply_bytes)(const int8_t* left, const int8_t* right, int32_t* sums) {
  SAE_FAST_ISA::Tiles tiles;
  tiles.load<0>(sums);
  tiles.load<1>(left);
  tiles.load<2>(right);
  tiles.multiply_int8<0, 1, 2>();
  tiles.store<0>(sums);
}

}  // namespace sae_fast::testing
