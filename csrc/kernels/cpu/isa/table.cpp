// This instruction set's table of kernels.
#include "kernels/cpu/isa/kernels.h"

#define SAE_FAST_STRING(name) #name
#define SAE_FAST_NAME(name) SAE_FAST_STRING(name)

namespace sae_fast::SAE_FAST_ISA {

const cpu::Kernels& kernel_table();

const cpu::Kernels& kernel_table() {
  static constexpr cpu::Kernels kTable = {SAE_FAST_NAME(SAE_FAST_ISA),
                                          pack_encoder,
                                          encode_topk,
                                          encode_batch_topk,
                                          encode_threshold,
                                          encoder_product,
                                          decode,
                                          decode_backward,
                                          reconstruct,
                                          accumulate_rows,
                                          gradient_norm,
                                          fused_update,
                                          update_vector,
                                          normalize_rows,
                                          gather_rows,
                                          decorrelation,
                                          dense_product,
                                          finish_product,
                                          code_correlation,
                                          code_correlation_backward};
  return kTable;
}

}  // namespace sae_fast::SAE_FAST_ISA
