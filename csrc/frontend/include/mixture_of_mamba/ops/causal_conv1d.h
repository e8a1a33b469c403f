// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/ops/optional_tensor.h>
#include <torch/types.h>

#include <tuple>

namespace mixture_of_mamba {

struct CausalConv1dOptions {
  OptionalTensor rows = {}, offsets = {}, cu_seqlens = {};
  OptionalTensor initial_state =
      {};  ///< [sequences, width - 1, channels], inputs before the first token, oldest first
  bool silu = true;
};

/// Depthwise causal convolution, as in the Mamba block (arXiv 2312.00752), optionally followed by SiLU.
/// \param x [batch, length, channels].
/// \param weight [channels, width], any width >= 1.
/// \param bias [channels].
/// \return y, shaped like x, and the final state [sequences, width - 1, channels]; both differentiable.
std::tuple<torch::Tensor, torch::Tensor> causal_conv1d(const torch::Tensor& x, const torch::Tensor& weight,
                                                       const OptionalTensor& bias = {},
                                                       const CausalConv1dOptions& options = {});

struct CausalConv1dStepOptions {
  OptionalTensor rows = {}, offsets = {};
  bool silu = true;
};

/// causal_conv1d() of one or a few tokens that updates `state` [batch, width - 1, channels] in place;
/// inference only.
/// \throws c10::Error where an input wants a gradient, or as causal_conv1d() does.
torch::Tensor causal_conv1d_step(const torch::Tensor& x, torch::Tensor& state, const torch::Tensor& weight,
                                 const OptionalTensor& bias = {},
                                 const CausalConv1dStepOptions& options = {});

}  // namespace mixture_of_mamba
