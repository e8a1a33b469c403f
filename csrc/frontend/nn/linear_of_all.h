// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "mixture_of_mamba/ops.h"
#include "mixture_of_mamba/routing.h"

namespace mixture_of_mamba::frontend {

// What all modalities share: one GEMM over all rows that are not padding, in the dtype of x as grouped_linear
// is. `bias` may be undefined.
inline at::Tensor linear_of_all(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                const std::optional<Routing>& routing) {
  if (!routing || !routing->has_padding) {
    return at::linear(x, weight.to(x.scalar_type()), bias.defined() ? bias.to(x.scalar_type()) : bias);
  }
  const Routing merged = routing->merged();
  std::vector<at::Tensor> biases;
  if (bias.defined()) biases.push_back(bias);
  return grouped_linear(x, {weight}, biases, merged.offsets, merged.host_offsets);
}

}  // namespace mixture_of_mamba::frontend
