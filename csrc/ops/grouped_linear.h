// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tuple>
#include <vector>

#include "ops/common.h"
#include "ops/products.h"

// grouped_linear: y[rows of m] = x[rows of m] @ weight[m].T + bias[m]; padding rows are 0.
//
// With row boundaries known on the host (CPU tensors, or host_offsets) it is a loop of torch's own GEMMs on
// row ranges. Without, everything stays on the device: see cuda/device_products.cpp. Where kernels of our own
// serve, it is one launch of one of them, wherever the boundaries are.

namespace mixture_of_mamba::ops {

struct GroupedInputs {
  GroupedInputs(const char* op, const Tensor& x, const Tensors& weight, const Tensors& bias,
                const Tensor& offsets, const OptionalTensor& host_offsets);

  Projection projection(const Products& products) const {
    return {products, weight, bias, boundaries, offsets};
  }

  Dtype dtype;
  int64_t rows, in_features, out_features, modalities;
  Tensor x;               // [rows, in_features], one row stride
  Tensors weight, bias;   // in x's dtype
  Boundaries boundaries;  // modalities + 1, or empty: known on the device only
  Tensor offsets;         // int32 [modalities + 1]
};

std::vector<int64_t> with_last_size(const Tensor& tensor, int64_t size);

using GroupedGradients = std::tuple<Tensor, Tensors, Tensors>;

template <typename Backend>
Tensor grouped_linear(Tensor x, Tensors weight, Tensors bias, Tensor offsets, OptionalTensor host_offsets) {
  const GroupedInputs in("grouped_linear", x, weight, bias, offsets, host_offsets);
  const Tensor y = torch::stable::new_empty(x, with_last_size(x, in.out_features), in.dtype);
  in.projection(Backend::products())
      .forward(MatrixView(in.x), MatrixView(y, in.rows, in.out_features, in.out_features));
  return y;
}

template <typename Backend>
GroupedGradients grouped_linear_backward(Tensor grad, Tensor x, Tensors weight, Tensor offsets,
                                         OptionalTensor host_offsets, bool needs_x, bool needs_weight,
                                         bool needs_bias) {
  const char* op = "grouped_linear_backward";
  const GroupedInputs in(op, x, weight, {}, offsets, host_offsets);
  require_floating(op, "grad", grad);
  require_device(op, "grad", grad, "x", x);
  require(grad.dim() == x.dim() && grad.numel() == in.rows * in.out_features, op, "grad must have shape ",
          "[..., out_features] with ", in.rows, " rows of ", in.out_features, ", got ", shape_of(grad));
  const MatrixView grad_rows(as_matrix(to_dtype(grad, in.dtype))), x_rows(in.x);
  const Projection projection = in.projection(Backend::products());
  const auto in_dtype_of = [&](Tensors grads) {
    for (size_t m = 0; m < grads.size(); ++m) grads[m] = to_dtype(grads[m], weight[m].scalar_type());
    return grads;
  };
  Tensor grad_x = empty_like_device(x, {0}, in.dtype);
  if (needs_x) {
    grad_x = torch::stable::new_empty(x, with_last_size(x, in.in_features), in.dtype);
    projection.grad_input(grad_rows, MatrixView(grad_x, in.rows, in.in_features, in.in_features));
  }
  return {grad_x, needs_weight ? in_dtype_of(projection.grad_weight(grad_rows, x_rows)) : Tensors{},
          needs_bias ? in_dtype_of(projection.grad_bias(grad_rows)) : Tensors{}};
}

}  // namespace mixture_of_mamba::ops
