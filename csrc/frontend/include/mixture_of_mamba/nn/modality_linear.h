// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/routing.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <ostream>
#include <vector>

namespace mixture_of_mamba::nn {

/// Options of ModalityLinear: ModalityLinear(ModalityLinearOptions(64, 128, 3).bias(false)).
struct ModalityLinearOptions {
  ModalityLinearOptions(int64_t in_features, int64_t out_features, int64_t num_modalities);
  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, out_features);
  /// One matrix each; ids are 0 .. num_modalities - 1.
  TORCH_ARG(int64_t, num_modalities);
  TORCH_ARG(bool, bias) = true;
  /// One more matrix, `shared`, for the tokens of all modalities: y = x @ (W_m + W_shared).T + b_m. It starts
  /// at zero.
  TORCH_ARG(bool, shared_expert) = false;
};

/// One torch::nn::Linear per modality, named "0", "1", ...: y[rows of m] = linears[m](x[rows of m]), plus
/// shared(x) where there is one; padding rows become 0.
class ModalityLinearImpl : public torch::nn::Cloneable<ModalityLinearImpl> {
 public:
  ModalityLinearImpl(int64_t in_features, int64_t out_features, int64_t num_modalities);
  /// \throws c10::ValueError less than one modality.
  explicit ModalityLinearImpl(const ModalityLinearOptions& options);

  void reset() override;
  /// As torch::nn::Linear does; the shared expert becomes zero.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// \param x [batch, length, in_features] with rows in sorted order.
  /// \return [batch, length, out_features], in the dtype of x.
  /// \throws c10::ValueError a routing of another number of modalities.
  torch::Tensor forward(const torch::Tensor& x, const Routing& routing);

  /// One matrix [out_features, in_features] per modality, the shared expert added.
  std::vector<torch::Tensor> weights() const;
  /// One vector [out_features] per modality, or none.
  std::vector<torch::Tensor> biases() const;

  ModalityLinearOptions options;
  std::vector<torch::nn::Linear> linears;
  torch::nn::Linear shared{nullptr};  ///< none without shared_expert
};

TORCH_MODULE(ModalityLinear);

}  // namespace mixture_of_mamba::nn
