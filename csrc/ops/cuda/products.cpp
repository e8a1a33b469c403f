// SPDX-License-Identifier: Apache-2.0
#include "ops/products.h"

#include <algorithm>

#include "ops/cuda/backend.h"
#include "ops/cuda/blas.h"
#include "ops/cuda/device_products.h"

namespace mixture_of_mamba::ops {

namespace {

constexpr int64_t kMostFeatures = int64_t{1} << 24;
// Of all modalities. On the device a modality may have all of them, and the products of groups are faster
// then.
constexpr int64_t kMostFewRows = 1024, kMostFewRowsOnDevice = 256;

bool contiguous_columns(const Tensor& tensor) { return tensor.stride(tensor.dim() - 1) == 1; }

bool all_contiguous(const Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), contiguous_columns);
}

bool sixteen_bits(Dtype dtype) { return dtype == Dtype::BFloat16 || dtype == Dtype::Half; }

// Of the rows that each weight owns: from the host, or where the device has them.
template <typename Params>
void fill_boundaries(Params& params, const Boundaries& boundaries, const OptionalTensor& offsets) {
  if (boundaries.empty()) params.offsets = offsets->const_data_ptr<int32_t>();
  for (size_t m = 0; m < boundaries.size(); ++m) params.begin[m] = static_cast<int32_t>(boundaries[m]);
}

bool few_rows(const MatrixView& input, const MatrixView& out, const Tensors& weight, const Tensors& bias,
              const Boundaries& boundaries, const OptionalTensor& offsets, Settled settled) {
  if (!sixteen_bits(out.dtype()) || weight.size() > FewRowsParams::kMostModalities ||
      out.rows() > (boundaries.empty() ? kMostFewRowsOnDevice : kMostFewRows) ||
      std::max(input.columns(), out.columns()) > kMostFeatures || !all_contiguous(weight) ||
      !all_contiguous(bias)) {
    return false;
  }
  const CudaBackend backend(weight[0]);
  FewRowsParams params;
  params.type = kernel_type("grouped_linear", weight[0], out.dtype());
  params.x = input.readable();
  params.y = out.writable();
  params.rows = static_cast<int32_t>(out.rows());
  params.in_features = static_cast<int32_t>(input.columns());
  params.out_features = static_cast<int32_t>(out.columns());
  params.modalities = static_cast<int32_t>(weight.size());
  fill_boundaries(params, boundaries, offsets);
  for (size_t m = 0; m < weight.size(); ++m) {
    params.weight[m] = weight[m].const_data_ptr();
    params.weight_stride[m] = weight[m].stride(0);
    params.bias[m] = bias.empty() ? nullptr : bias[m].const_data_ptr();
  }
  params.settled = settled;
  if (!few_rows_supports(params)) return false;
  backend.run(params);
  return true;
}

bool grouped(const GroupedProduct& product) {
  using Kind = GroupedProduct::Kind;
  const auto& [kind, x, y, weight, bias, boundaries, offsets] = product;
  const bool input_wanted = kind == Kind::kGradInput || kind == Kind::kAddGradInput;
  const bool by_rows = all_contiguous(weight);
  const auto by_columns = [](const Tensor& matrix) { return matrix.stride(0) == 1; };
  if (!sixteen_bits(y.dtype()) || weight.size() > GroupedGemmParams::kMostGroups || y.rows() > INT32_MAX ||
      std::max(x.columns(), y.columns()) > kMostFeatures || !all_contiguous(bias) ||
      (!by_rows && !std::all_of(weight.begin(), weight.end(), by_columns))) {
    return false;
  }
  const MatrixView &left = input_wanted ? y : x, &right = input_wanted ? x : y;
  GroupedGemmParams params;
  params.type = kernel_type("grouped_linear", weight[0], y.dtype());
  params.result =
      kind == Kind::kGradWeight ? GroupedGemmParams::Result::kMatrix : GroupedGemmParams::Result::kRight;
  params.rows = static_cast<int32_t>(y.rows());
  params.groups = static_cast<int32_t>(weight.size());
  params.left = left.readable();
  if (kind == Kind::kGradWeight) {
    const ConstRows read = right.readable();
    params.right = {const_cast<void*>(read.data), read.stride};
  } else {
    params.right = right.writable();
  }
  params.left_columns = static_cast<int32_t>(left.columns());
  params.right_columns = static_cast<int32_t>(right.columns());
  params.transposed = by_rows == input_wanted;
  params.add = kind == Kind::kAddGradInput;
  fill_boundaries(params, boundaries, offsets);
  for (size_t m = 0; m < weight.size(); ++m) {
    params.matrix[m] = const_cast<void*>(weight[m].const_data_ptr());
    params.matrix_stride[m] = weight[m].stride(by_rows ? 0 : 1);
    if (kind == Kind::kForward && !bias.empty()) params.bias[m] = bias[m].const_data_ptr();
  }
  const CudaBackend backend(weight[0]);
  if (!grouped_gemm_supports(params)) return false;
  backend.run(params);
  return true;
}

}  // namespace

const Products& CudaBackend::products() {
  static const Products functions{
      aoti_torch_cuda_mm_out, aoti_torch_cuda_addmm_out, multiply_by_cublas, few_rows, grouped,
      &device_products()};
  return functions;
}

}  // namespace mixture_of_mamba::ops
