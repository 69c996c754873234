// The product on two bytes an operand that screens candidates at this instruction set.
#pragma once

#include "kernels/cpu/isa/product.h"
#include "kernels/cpu/isa/tile_filter.h"
#include "kernels/cpu/isa/tile_product.h"

namespace sae_fast::SAE_FAST_ISA {

#if defined(SAE_FAST_TILES)
using NarrowProduct = TileProduct;
template <class Product>
constexpr bool kFiltersSums = std::is_same_v<Product, TileProduct>;  // has multiply_and_filter
#else
using NarrowProduct = Int16Product;
template <class Product>
constexpr bool kFiltersSums = false;
#endif

// True if a product's sums are the scores, so that candidates need no second scoring: for tiles
// when scores are defined on bfloat16 rows, which tiles represent exactly; the order of a
// tile's sum depends on d_in alone. Tokens and latents excluded from screening are scored in
// strips.
template <class Product, class T>
constexpr bool kSumsAreScores =
    std::is_same_v<Product, NarrowProduct> && !Product::kScaled && std::is_same_v<T, BFloat16>;

}  // namespace sae_fast::SAE_FAST_ISA
