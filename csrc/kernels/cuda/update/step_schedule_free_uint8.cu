#include "kernels/cuda/update/step_kernel.cuh"

namespace sae_fast::cuda {

template cudaError_t update_rows<UpdateRule::kScheduleFreeSignum, DType::kUInt8>(const RowUpdate&,
                                                                                 cudaStream_t);

}  // namespace sae_fast::cuda
