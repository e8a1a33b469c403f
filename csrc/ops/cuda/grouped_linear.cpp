// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_linear.h"

#include <array>

#include "kernels/cuda/device_info.h"
#include "ops/cuda/backend.h"

// Row boundaries on the host: a loop of cuBLAS GEMMs on row ranges (0-3 % over one dense GEMM).
// Few rows, as in decoding, are one launch of a kernel of our own, wherever the boundaries are.
// On the device only, so that a CUDA graph may be replayed with another mix, in two forms:
//   * aten::_grouped_mm where it is fast and never synchronises: bfloat16, compute capability 9.0 and
//     up, 16-byte rows;
//   * otherwise one GEMM over all rows per modality, of which the modality's rows are kept. It costs
//     `modalities` times the arithmetic and serves every dtype and shape.

namespace mixture_of_mamba::ops {

namespace {

int64_t address(const Tensor& tensor) { return reinterpret_cast<int64_t>(tensor.data_ptr()); }

bool sixteen_byte_rows(const Tensor& matrix) {
  constexpr int64_t kElements = 8;
  return matrix.size(1) % kElements == 0 && matrix.stride(0) % kElements == 0 && address(matrix) % 16 == 0;
}

bool grouped_mm_serves(const GroupedInputs& in, const Tensor& grad_or_x) {
  return in.dtype == Dtype::BFloat16 && in.rows > 0 && in.in_features % 8 == 0 && in.out_features % 8 == 0 &&
         in.in_features > 0 && in.out_features > 0 && sixteen_byte_rows(in.x) &&
         sixteen_byte_rows(grad_or_x) && compute_capability_cuda() / 10 >= 9 &&
         compute_capability_cuda() / 10 <= 10;
}

Tensor stack(const Tensors& tensors) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> arguments{from(tensors), from(int64_t{0})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::stack", "", arguments.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(arguments[0]);
}

Tensor grouped_mm(const Tensor& left, const Tensor& right, const Tensor& group_ends) {
  using torch::stable::detail::from;
  std::array<StableIValue, 5> arguments{from(left), from(right), from(OptionalTensor(group_ends)),
                                        from(OptionalTensor()), from(std::optional<Dtype>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_grouped_mm", "", arguments.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(arguments[0]);
}

Tensor group_ends(const GroupedInputs& in) {
  Tensor offsets = in.offsets;
  return packed(torch::stable::narrow(offsets, 0, 1, in.modalities));
}

const int32_t* offsets_data(const GroupedInputs& in) { return in.offsets.const_data_ptr<int32_t>(); }

ConstRows const_rows(const Tensor& matrix) { return {matrix.const_data_ptr(), matrix.stride(0)}; }
Rows mutable_rows(const Tensor& matrix) { return {matrix.mutable_data_ptr(), matrix.stride(0)}; }

void select_rows(const CudaBackend& backend, const GroupedInputs& in, const Tensor& source, const Tensor& out,
                 int64_t modality, bool zero_other_rows) {
  SelectRowsParams params;
  params.type = kernel_type("grouped_linear", source, in.dtype);
  params.source = const_rows(source);
  params.out = mutable_rows(out);
  params.rows = in.rows;
  params.columns = source.size(1);
  params.offsets = offsets_data(in);
  params.modality = static_cast<int32_t>(modality);
  params.zero_other_rows = zero_other_rows;
  backend.run(params);
}

void finish_rows(const CudaBackend& backend, const GroupedInputs& in, const Tensor& y) {
  FinishRowsParams params;
  const OptionalTensor bias = in.bias.empty() ? OptionalTensor() : OptionalTensor(stack(in.bias));
  params.type = kernel_type("grouped_linear", y, in.dtype);
  params.y = mutable_rows(y);
  params.rows = in.rows;
  params.columns = y.size(1);
  params.offsets = offsets_data(in);
  params.modalities = static_cast<int32_t>(in.modalities);
  params.bias = bias ? bias->const_data_ptr() : nullptr;
  backend.run(params);
}

struct DevicePath {
  // out = input @ weight[m], or its transpose, for the rows of each modality, then bias and zeros for padding
  static void rows_times_weights(const GroupedInputs& in, const Tensor& input, bool transpose,
                                 const Tensor& out) {
    if (in.rows == 0) return;
    const CudaBackend backend(in.x);
    if (grouped_mm_serves(in, input)) {
      // Stacked as they lie: a copy that transposes is ten times as slow.
      const Tensor weights = stack(in.weight);
      const Tensor right = transpose ? torch::stable::transpose(weights, 1, 2) : weights;
      Tensor destination = out;
      torch::stable::copy_(destination, grouped_mm(input, right, group_ends(in)));
    } else {
      const Tensor all = empty_like_device(in.x, {in.rows, out.size(1)}, in.dtype);
      for (int64_t m = 0; m < in.modalities; ++m) {
        CudaBackend::products().assign(Part::of(all), Part::of(input), Part::of(in.weight[m], transpose));
        select_rows(backend, in, all, out, m, m == 0);
      }
    }
    finish_rows(backend, in, out);
  }

  static void forward(const GroupedInputs& in, const Tensor& y) {
    if (CudaBackend::products().few_rows(MatrixView(in.x), MatrixView(y), in.weight, in.bias, {}, in.offsets,
                                         Settled::kNothing)) {
      return;
    }
    rows_times_weights(in, in.x, true, y);
  }

  static void grad_x(const GroupedInputs& in, const Tensor& grad, const Tensor& out) {
    rows_times_weights(in, grad, false, out);
  }

  static Tensors grad_weight(const GroupedInputs& in, const Tensor& grad) {
    const CudaBackend backend(in.x);
    Tensors grads;
    if (grouped_mm_serves(in, grad)) {
      const Tensor all = grouped_mm(torch::stable::transpose(grad, 0, 1), in.x, group_ends(in));
      for (int64_t m = 0; m < in.modalities; ++m) {
        grads.push_back(torch::stable::clone(torch::stable::select(all, 0, m)));
      }
      return grads;
    }
    const Tensor grad_part = empty_like_device(in.x, {in.rows, in.out_features}, in.dtype);
    const Tensor x_part = empty_like_device(in.x, {in.rows, in.in_features}, in.dtype);
    for (int64_t m = 0; m < in.modalities; ++m) {
      Tensor out = empty_like_device(in.x, {in.out_features, in.in_features}, in.dtype);
      if (in.rows == 0) {
        torch::stable::zero_(out);
      } else {
        select_rows(backend, in, grad, grad_part, m, true);
        select_rows(backend, in, in.x, x_part, m, true);
        CudaBackend::products().assign(Part::of(out), Part::of(grad_part, true), Part::of(x_part));
      }
      grads.push_back(out);
    }
    return grads;
  }

  static Tensors grad_bias(const GroupedInputs& in, const Tensor& grad) {
    const CudaBackend backend(in.x);
    const Tensor sums = empty_like_device(in.x, {in.modalities, in.out_features}, Dtype::Float);
    SumRowsParams params;
    params.type = kernel_type("grouped_linear_backward", grad, in.dtype);
    params.source = const_rows(grad);
    params.rows = in.rows;
    params.columns = in.out_features;
    params.offsets = offsets_data(in);
    params.modalities = static_cast<int32_t>(in.modalities);
    params.sums = sums.mutable_data_ptr<float>();
    backend.run(params);
    Tensors grads;
    for (int64_t m = 0; m < in.modalities; ++m) {
      grads.push_back(torch::stable::clone(torch::stable::select(sums, 0, m)));
    }
    return grads;
  }
};

// The boundaries decide the path when the call arrives.
struct CudaPath {
  static void forward(const GroupedInputs& in, const Tensor& y) {
    in.boundaries.empty() ? DevicePath::forward(in, y) : HostPath<CudaBackend>::forward(in, y);
  }
  static void grad_x(const GroupedInputs& in, const Tensor& grad, const Tensor& out) {
    in.boundaries.empty() ? DevicePath::grad_x(in, grad, out) : HostPath<CudaBackend>::grad_x(in, grad, out);
  }
  static Tensors grad_weight(const GroupedInputs& in, const Tensor& grad) {
    return in.boundaries.empty() ? DevicePath::grad_weight(in, grad)
                                 : HostPath<CudaBackend>::grad_weight(in, grad);
  }
  static Tensors grad_bias(const GroupedInputs& in, const Tensor& grad) {
    return in.boundaries.empty() ? DevicePath::grad_bias(in, grad)
                                 : HostPath<CudaBackend>::grad_bias(in, grad);
  }
};

}  // namespace

}  // namespace mixture_of_mamba::ops

STABLE_TORCH_LIBRARY_IMPL(mixture_of_mamba, CUDA, m) {
  using namespace mixture_of_mamba::ops;
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear<CudaPath>));
  m.impl("grouped_linear_backward", TORCH_BOX(&grouped_linear_backward<CudaPath>));
}
