// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <ostream>

namespace mixture_of_mamba::nn {

/// Options of RMSNorm: RMSNorm(RMSNormOptions(64).eps(1e-6)).
struct RMSNormOptions {
  RMSNormOptions(int64_t size);  // NOLINT(google-explicit-constructor): as torch's own options of one number
  /// Of the last dimension.
  TORCH_ARG(int64_t, size);
  TORCH_ARG(double, eps) = 1e-5;
};

/// y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467), as Python's
/// torch.nn.RMSNorm, which torch::nn lacks.
class RMSNormImpl : public torch::nn::Cloneable<RMSNormImpl> {
 public:
  explicit RMSNormImpl(const RMSNormOptions& options);

  void reset() override;
  /// All ones.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// \param x [..., size] of a floating type. \return the same shape.
  /// \throws c10::Error another last dimension.
  torch::Tensor forward(const torch::Tensor& x);

  RMSNormOptions options;
  torch::Tensor weight;  ///< [size], ones before training
};

TORCH_MODULE(RMSNorm);

}  // namespace mixture_of_mamba::nn
