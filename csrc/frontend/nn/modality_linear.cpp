// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/nn/modality_linear.h"

#include <torch/nn/init.h>

#include "linear_of_all.h"
#include "mixture_of_mamba/ops.h"
#include "text.h"

namespace mixture_of_mamba::nn {

// From so many rows on the shared expert is added to the matrices, below it is a product of its own; see the
// Python package's modality_linear.py for the number.
static constexpr int64_t kSumWeightsFromRows = 256;

ModalityLinearOptions::ModalityLinearOptions(int64_t in_features, int64_t out_features,
                                             int64_t num_modalities)
    : in_features_(in_features), out_features_(out_features), num_modalities_(num_modalities) {}

ModalityLinearImpl::ModalityLinearImpl(int64_t in_features, int64_t out_features, int64_t num_modalities)
    : ModalityLinearImpl(ModalityLinearOptions(in_features, out_features, num_modalities)) {}

ModalityLinearImpl::ModalityLinearImpl(const ModalityLinearOptions& options_) : options(options_) {
  frontend::require_value(options.num_modalities() >= 1, "num_modalities must be at least 1, got {}",
                          options.num_modalities());
  ModalityLinearImpl::reset();
}

void ModalityLinearImpl::reset() {
  linears.clear();
  const auto each =
      torch::nn::LinearOptions(options.in_features(), options.out_features()).bias(options.bias());
  for (int64_t m = 0; m < options.num_modalities(); ++m) {
    linears.push_back(register_module(fmt::to_string(m), torch::nn::Linear(each)));
  }
  shared = nullptr;
  if (options.shared_expert()) {
    const auto all = torch::nn::LinearOptions(options.in_features(), options.out_features()).bias(false);
    shared = register_module("shared", torch::nn::Linear(all));
    torch::nn::init::zeros_(shared->weight);
  }
}

void ModalityLinearImpl::reset_parameters() {
  for (torch::nn::Linear& linear : linears) linear->reset_parameters();
  if (shared) {
    shared->reset_parameters();  // as in Python, whose random numbers go on from there
    torch::nn::init::zeros_(shared->weight);
  }
}

void ModalityLinearImpl::pretty_print(std::ostream& stream) const {
  stream << fmt::format(
      "mixture_of_mamba::nn::ModalityLinear(in_features={}, out_features={}, num_modalities={})",
      options.in_features(), options.out_features(), options.num_modalities());
}

std::vector<torch::Tensor> ModalityLinearImpl::weights() const {
  std::vector<torch::Tensor> tensors;
  for (const torch::nn::Linear& linear : linears) {
    tensors.push_back(shared ? linear->weight + shared->weight : linear->weight);
  }
  return tensors;
}

std::vector<torch::Tensor> ModalityLinearImpl::biases() const {
  std::vector<torch::Tensor> tensors;
  for (const torch::nn::Linear& linear : linears) {
    if (linear->bias.defined()) tensors.push_back(linear->bias);
  }
  return tensors;
}

torch::Tensor ModalityLinearImpl::forward(const torch::Tensor& x, const Routing& routing) {
  frontend::require_value(routing.num_modalities() == options.num_modalities(),
                          "routing must be a Routing of {} modalities, got {}", options.num_modalities(),
                          routing.num_modalities());
  if (!shared || routing.num_tokens() >= kSumWeightsFromRows) {
    return grouped_linear(x, weights(), biases(), routing.offsets, routing.host_offsets);
  }
  std::vector<torch::Tensor> specific;
  for (const torch::nn::Linear& linear : linears) specific.push_back(linear->weight);
  const torch::Tensor y = grouped_linear(x, specific, biases(), routing.offsets, routing.host_offsets);
  return y + frontend::linear_of_all(x, shared->weight, {}, routing);
}

}  // namespace mixture_of_mamba::nn
