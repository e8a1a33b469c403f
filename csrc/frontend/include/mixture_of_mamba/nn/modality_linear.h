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
  TORCH_ARG(int64_t, num_modalities);
  TORCH_ARG(bool, bias) = true;
};

/// One torch::nn::Linear per modality, named "0", "1", ...: y[rows of m] = linears[m](x[rows of m]); padding
/// rows become 0. One grouped_linear() call.
class ModalityLinearImpl : public torch::nn::Cloneable<ModalityLinearImpl> {
 public:
  ModalityLinearImpl(int64_t in_features, int64_t out_features, int64_t num_modalities);
  explicit ModalityLinearImpl(const ModalityLinearOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// x [batch, length, in_features] with rows in sorted order -> [batch, length, out_features].
  torch::Tensor forward(const torch::Tensor& x, const Routing& routing);

  ModalityLinearOptions options;
  std::vector<torch::nn::Linear> linears;
};

TORCH_MODULE(ModalityLinear);

}  // namespace mixture_of_mamba::nn
