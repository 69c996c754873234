// Element types that are known at run time.
#pragma once

namespace sae_fast {

// kUInt8 is for an optimizer's moments: codes with a scale for each block of columns, moments.h.
enum class DType { kFloat32, kBFloat16, kFloat16, kUInt8 };

}  // namespace sae_fast
