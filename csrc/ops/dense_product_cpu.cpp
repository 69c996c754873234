// CPU side of dense_product: check, allocate, call; torch's product where there are no tiles.
#include "ops/dense_product.h"

#include "ops/cpu.h"

namespace sae_fast::ops {
namespace {

// A matrix whose rows or columns are contiguous, and a contiguous copy where neither are.
class OperandInput {
 public:
  explicit OperandInput(const Tensor& tensor)
      : tensor_(has_unit_stride(tensor) ? tensor : torch::stable::contiguous(tensor)) {}

  const float* data() const { return static_cast<const float*>(tensor_.const_data_ptr()); }
  int64_t stride(int64_t dimension) const { return tensor_.stride(dimension); }

 private:
  // In a dimension of one element any stride may stand; overlapping rows are copied.
  static bool has_unit_stride(const Tensor& tensor) {
    const auto fits = [&](int64_t inner, int64_t outer) {
      return tensor.stride(inner) == 1 && tensor.stride(outer) >= tensor.size(inner);
    };
    return fits(1, 0) || fits(0, 1);
  }

  Tensor tensor_;
};

// The depth from which float32 products are made of integers: below it the largest number of a row
// is so much of the row that integers are less exact than a float32 sum.
constexpr int64_t kLeastDepth = 256;

Tensor dense_product(const Tensor& left, const Tensor& right, const OptionalTensor& bias, bool relu,
                     const std::string& precision) {
  constexpr const char* kOp = "dense_product";
  check_dense_product(kOp, left, right, bias, precision);
  const Input biases(bias);
  cpu::DenseProblem problem{};
  problem.rows = left.size(0);
  problem.columns = right.size(1);
  problem.depth = left.size(1);
  problem.rounded = precision == "bf16";  // in the tiles
  problem.bias = biases.data<float>();
  problem.relu = relu;
  if (problem.rounded || problem.depth >= kLeastDepth) {
    const std::string ahead = problem.rounded ? "fp32" : precision;
    const OperandInput rows(rounded_operand(left, ahead)), columns(rounded_operand(right, ahead));
    const Tensor product = torch::stable::new_empty(left, {problem.rows, problem.columns});
    problem.left = {rows.data(), rows.stride(0), rows.stride(1)};
    problem.right = {columns.data(), columns.stride(1), columns.stride(0)};
    problem.product = mutable_data<float>(product);
    const cpu::DenseResult result = cpu::kernels().dense_product(problem, parallel());
    check_memory(kOp, result != cpu::DenseResult::kNoMemory);
    if (result == cpu::DenseResult::kDone) return product;
  }
  const Tensor product = torch::stable::contiguous(product_by_torch(left, right, precision));
  problem.product = mutable_data<float>(product);
  cpu::kernels().finish_product(problem, parallel());
  return product;
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CPU, m) {
  SAE_FAST_IMPL(m, "dense_product", &sae_fast::ops::dense_product);
}
