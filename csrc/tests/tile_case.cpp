#include "tests/tile_case.h"

#include "kernels/cpu/isa/tiles.h"

namespace sae_fast::testing {

#if defined(SAE_FAST_EMULATE_TILES)
void multiply_tile_emulated(const uint16_t* left, const uint16_t* right, float* sums) {
#else
void multiply_tile_on_hardware(const uint16_t* left, const uint16_t* right, float* sums) {
#endif
  SAE_FAST_ISA::Tiles tiles;
  tiles.load<0>(sums);
  tiles.load<1>(left);
  tiles.load<2>(right);
  tiles.multiply_bfloat16<0, 1, 2>();
  tiles.store<0>(sums);
}

}  // namespace sae_fast::testing
