// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <vector>

namespace examples {

/// Scales all gradients down to a total norm of `limit`; the norm before. It stays on the device, where
/// torch::nn::utils::clip_grad_norm_ waits for it.
inline torch::Tensor clip_gradients(const std::vector<torch::Tensor>& parameters, double limit) {
  std::vector<torch::Tensor> gradients;
  for (const torch::Tensor& parameter : parameters) gradients.push_back(parameter.grad());
  const torch::Tensor norm = torch::stack(torch::_foreach_norm(gradients)).norm();
  torch::_foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp_max(1.0));
  return norm;
}

}  // namespace examples
