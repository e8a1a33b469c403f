// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/nn/modality_linear.h"

#include "mixture_of_mamba/ops.h"
#include "text.h"

namespace mixture_of_mamba::nn {

ModalityLinearOptions::ModalityLinearOptions(int64_t in_features, int64_t out_features,
                                             int64_t num_modalities)
    : in_features_(in_features), out_features_(out_features), num_modalities_(num_modalities) {}

ModalityLinearImpl::ModalityLinearImpl(int64_t in_features, int64_t out_features, int64_t num_modalities)
    : ModalityLinearImpl(ModalityLinearOptions(in_features, out_features, num_modalities)) {}

ModalityLinearImpl::ModalityLinearImpl(const ModalityLinearOptions& options_) : options(options_) {
  ModalityLinearImpl::reset();
}

void ModalityLinearImpl::reset() {
  linears.clear();
  const auto each =
      torch::nn::LinearOptions(options.in_features(), options.out_features()).bias(options.bias());
  for (int64_t m = 0; m < options.num_modalities(); ++m) {
    linears.push_back(register_module(fmt::to_string(m), torch::nn::Linear(each)));
  }
}

void ModalityLinearImpl::reset_parameters() {
  for (torch::nn::Linear& linear : linears) linear->reset_parameters();
}

void ModalityLinearImpl::pretty_print(std::ostream& stream) const {
  stream << fmt::format(
      "mixture_of_mamba::nn::ModalityLinear(in_features={}, out_features={}, num_modalities={})",
      options.in_features(), options.out_features(), options.num_modalities());
}

torch::Tensor ModalityLinearImpl::forward(const torch::Tensor& x, const Routing& routing) {
  std::vector<torch::Tensor> weights, biases;
  for (const torch::nn::Linear& linear : linears) {
    weights.push_back(linear->weight);
    if (linear->bias.defined()) biases.push_back(linear->bias);
  }
  return grouped_linear(x, weights, biases, routing.offsets, routing.host_offsets);
}

}  // namespace mixture_of_mamba::nn
