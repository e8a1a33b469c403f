// SPDX-License-Identifier: Apache-2.0
#include "ops/products.h"

#include <algorithm>

#include "ops/cuda/backend.h"
#include "ops/cuda/blas.h"
#include "ops/cuda/device_products.h"

namespace mixture_of_mamba::ops {

namespace {

constexpr int64_t kMostFeatures = int64_t{1} << 24;
constexpr int64_t kMostRows = 1024;  // looked at no further

bool contiguous_columns(const Tensor& tensor) { return tensor.stride(tensor.dim() - 1) == 1; }

bool few_rows(const MatrixView& input, const MatrixView& out, const Tensors& weight, const Tensors& bias,
              const Boundaries& boundaries, const OptionalTensor& offsets, Settled settled) {
  const bool sixteen_bits = out.dtype() == Dtype::BFloat16 || out.dtype() == Dtype::Half;
  if (!sixteen_bits || weight.size() > FewRowsParams::kMostModalities || out.rows() > kMostRows ||
      std::max(input.columns(), out.columns()) > kMostFeatures ||
      !std::all_of(weight.begin(), weight.end(), contiguous_columns) ||
      !std::all_of(bias.begin(), bias.end(), contiguous_columns)) {
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
  params.offsets = boundaries.empty() ? offsets->const_data_ptr<int32_t>() : nullptr;
  for (size_t m = 0; m < boundaries.size(); ++m) params.begin[m] = static_cast<int32_t>(boundaries[m]);
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

}  // namespace

const Products& CudaBackend::products() {
  static const Products functions{aoti_torch_cuda_mm_out, aoti_torch_cuda_addmm_out, multiply_by_cublas,
                                  few_rows, &device_products()};
  return functions;
}

}  // namespace mixture_of_mamba::ops
