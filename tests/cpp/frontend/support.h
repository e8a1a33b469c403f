// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/torch.h>

#undef CHECK  // torch's logging has macros of the same names
#undef CHECK_EQ
#include <functional>
#include <string>
#include <vector>

#include "../catch.h"
#include "mixture_of_mamba/models.h"
#include "mixture_of_mamba/nn.h"

namespace mixture_of_mamba::testing {

using Catch::Matchers::StartsWith;
#if __has_include(<catch2/catch_all.hpp>)
using Catch::Matchers::ContainsSubstring;
#else  // version 2 has another name for it
inline auto ContainsSubstring(const std::string& text) { return Catch::Matchers::Contains(text); }
#endif

using torch::Tensor;
using Tensors = std::vector<Tensor>;

inline Tensor randn(std::initializer_list<int64_t> sizes) { return torch::randn(sizes, torch::kFloat64); }
inline Tensor leaf(std::initializer_list<int64_t> sizes) { return randn(sizes).requires_grad_(); }
inline Tensor random_ids(int64_t batch, int64_t length, int64_t modalities, bool padding = true) {
  return torch::randint(padding ? -1 : 0, modalities, {batch, length}, torch::kInt64);
}

// Fails with the largest difference.
void require_close(const std::string& name, const Tensor& got, const Tensor& expected,
                   double tolerance = 1e-9);

// The text of what `run` throws, which must be an error of torch.
std::string error_of(const std::function<void()>& run);

// A layer in float64 whose parameters, the shared ones too, are random: nothing cancels by accident.
nn::MixtureOfMamba make_layer(const nn::MixtureOfMambaOptions& options);

// Gradients of sum(outputs * weights) for fixed random weights; zeros where an input was not used.
Tensors gradients(const Tensors& outputs, const Tensors& inputs);

// Compares gradients with central differences, one element of one input after the other.
void require_gradients(const std::function<Tensors()>& run,
                       const std::vector<std::pair<std::string, Tensor>>& inputs);

// The layer written out: every token on its own goes through its modality's weights; padding does not exist.
// x [length, d_model]; `state` goes in and comes out, and begins with zeros where it is undefined.
struct ReferenceState {
  Tensors inputs;  // of the convolution, the last d_conv - 1
  Tensor h;        // [d_inner, d_state]
};
Tensor reference_sequence(nn::MixtureOfMambaImpl& layer, const Tensor& x, const Tensor& ids,
                          ReferenceState& state);
// x [batch, length, d_model], each row on its own.
Tensor reference_layer(nn::MixtureOfMambaImpl& layer, const Tensor& x, const Tensor& ids);

}  // namespace mixture_of_mamba::testing
