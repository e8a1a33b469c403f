// SPDX-License-Identifier: Apache-2.0
#include "ops/cuda/device_products.h"

#include <array>

#include "kernels/cuda/device_info.h"
#include "ops/cuda/backend.h"

// Products of row ranges that only the device knows, so that a CUDA graph may be replayed with another mix,
// in two forms:
//   * aten::_grouped_mm where it is fast and never synchronises: bfloat16, compute capability 9.0 and up,
//     16-byte rows;
//   * otherwise one GEMM over all rows per modality, of which the modality's rows are kept. It costs
//     `modalities` times the arithmetic and serves every dtype and shape.

namespace mixture_of_mamba::ops {

namespace {

const char* const kOp = "grouped_linear";

bool sixteen_byte_rows(const MatrixView& matrix) {
  constexpr int64_t kElements = 8;
  return matrix.columns() % kElements == 0 && matrix.row_stride() % kElements == 0 &&
         reinterpret_cast<uintptr_t>(matrix.readable().data) % 16 == 0;
}

bool grouped_mm_serves(const MatrixView& one, const MatrixView& other) {
  const int generation = compute_capability_cuda() / 10;
  return one.dtype() == Dtype::BFloat16 && one.rows() > 0 && one.columns() > 0 && other.columns() > 0 &&
         sixteen_byte_rows(one) && sixteen_byte_rows(other) && (generation == 9 || generation == 10);
}

Part all_rows(const MatrixView& matrix, bool transposed = false) {
  return {matrix, 0, matrix.rows(), transposed};
}

Tensor stack(const Tensors& tensors) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> arguments{from(tensors), from(int64_t{0})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::stack", "", arguments.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(arguments[0]);
}

Tensor grouped_mm(const Tensor& left, const Tensor& right, const Tensor& offsets) {
  using torch::stable::detail::from;
  Tensor boundaries = offsets;
  const Tensor ends = packed(torch::stable::narrow(boundaries, 0, 1, offsets.numel() - 1));
  std::array<StableIValue, 5> arguments{from(left), from(right), from(OptionalTensor(ends)),
                                        from(OptionalTensor()), from(std::optional<Dtype>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_grouped_mm", "", arguments.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(arguments[0]);
}

// What a launch needs beside its matrices.
struct Rule {
  const CudaBackend backend;
  const Tensor& offsets;

  int32_t modalities() const { return static_cast<int32_t>(offsets.numel() - 1); }

  // What all kernels here want of the matrix that they walk over.
  template <typename Params>
  Params params_of(const MatrixView& matrix) const {
    Params params;
    params.type = kernel_type(kOp, offsets, matrix.dtype());
    params.rows = matrix.rows();
    params.columns = matrix.columns();
    params.offsets = offsets.const_data_ptr<int32_t>();
    return params;
  }

  void select_rows(const MatrixView& source, const MatrixView& out, size_t modality,
                   bool zero_other_rows) const {
    auto params = params_of<SelectRowsParams>(out);
    params.source = source.readable();
    params.out = out.writable();
    params.modality = static_cast<int32_t>(modality);
    params.zero_other_rows = zero_other_rows;
    backend.run(params);
  }

  // Adds a bias, and clears padding.
  void finish_rows(const MatrixView& y, const Tensors& bias) const {
    const OptionalTensor matrix = bias.empty() ? OptionalTensor() : OptionalTensor(stack(bias));
    auto params = params_of<FinishRowsParams>(y);
    params.y = y.writable();
    params.modalities = modalities();
    params.bias = matrix ? matrix->const_data_ptr() : nullptr;
    backend.run(params);
  }

  // out = input @ weight[m], or its transpose, for the rows of each modality.
  void rows_times_weights(const MatrixView& input, const Tensors& weight, bool transpose,
                          const MatrixView& out) const {
    if (grouped_mm_serves(input, out)) {
      // Stacked as they lie: a copy that transposes is ten times as slow.
      const Tensor weights = stack(weight);
      const Tensor right = transpose ? torch::stable::transpose(weights, 1, 2) : weights;
      Tensor destination = out.tensor();
      torch::stable::copy_(destination, grouped_mm(input.tensor(), right, offsets));
      return;
    }
    const MatrixView all(empty_like_device(weight[0], {out.rows(), out.columns()}, out.dtype()));
    for (size_t m = 0; m < weight.size(); ++m) {
      CudaBackend::products().assign(all_rows(all), all_rows(input), Part::of(weight[m], transpose));
      select_rows(all, out, m, m == 0);
    }
  }
};

void forward(const MatrixView& input, const MatrixView& out, const Tensors& weight, const Tensors& bias,
             const Tensor& offsets) {
  if (out.rows() == 0) return;
  const Rule rule{CudaBackend(offsets), offsets};
  rule.rows_times_weights(input, weight, true, out);
  rule.finish_rows(out, bias);
}

void grad_input(const MatrixView& grad, const MatrixView& out, const Tensors& weight, const Tensor& offsets) {
  if (out.rows() == 0) return;
  const Rule rule{CudaBackend(offsets), offsets};
  rule.rows_times_weights(grad, weight, false, out);
  rule.finish_rows(out, {});
}

Tensors grad_weight(const MatrixView& grad, const MatrixView& input, const Tensor& offsets) {
  const Rule rule{CudaBackend(offsets), offsets};
  const auto empty = [&](int64_t rows, int64_t columns) {
    return empty_like_device(offsets, {rows, columns}, grad.dtype());
  };
  Tensors grads;
  if (grouped_mm_serves(grad, input)) {
    const Tensor left = grad.tensor();
    const Tensor all = grouped_mm(torch::stable::transpose(left, 0, 1), input.tensor(), offsets);
    for (int64_t m = 0; m < rule.modalities(); ++m) {
      grads.push_back(torch::stable::clone(torch::stable::select(all, 0, m)));
    }
    return grads;
  }
  const MatrixView grad_part(empty(grad.rows(), grad.columns()));
  const MatrixView input_part(empty(input.rows(), input.columns()));
  for (int32_t m = 0; m < rule.modalities(); ++m) {
    Tensor out = empty(grad.columns(), input.columns());
    if (grad.rows() == 0) {
      torch::stable::zero_(out);
    } else {
      rule.select_rows(grad, grad_part, m, true);
      rule.select_rows(input, input_part, m, true);
      CudaBackend::products().assign(Part::of(out), all_rows(grad_part, true), all_rows(input_part));
    }
    grads.push_back(out);
  }
  return grads;
}

Tensors grad_bias(const MatrixView& grad, const Tensor& offsets) {
  const Rule rule{CudaBackend(offsets), offsets};
  const Tensor sums = empty_like_device(offsets, {rule.modalities(), grad.columns()}, Dtype::Float);
  auto params = rule.params_of<SumRowsParams>(grad);
  params.source = grad.readable();
  params.modalities = rule.modalities();
  params.sums = sums.mutable_data_ptr<float>();
  rule.backend.run(params);
  Tensors grads;
  for (int64_t m = 0; m < rule.modalities(); ++m) {
    grads.push_back(torch::stable::clone(torch::stable::select(sums, 0, m)));
  }
  return grads;
}

}  // namespace

const DeviceProducts& device_products() {
  static constexpr DeviceProducts functions{forward, grad_input, grad_weight, grad_bias};
  return functions;
}

}  // namespace mixture_of_mamba::ops
