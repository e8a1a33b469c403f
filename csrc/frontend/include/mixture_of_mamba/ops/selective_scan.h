// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/ops/optional_tensor.h>
#include <torch/types.h>

#include <tuple>

namespace mixture_of_mamba {

struct SelectiveScanOptions {
  OptionalTensor D = {};        ///< [channels]
  OptionalTensor z = {};        ///< [batch, length, channels]
  OptionalTensor dt_bias = {};  ///< [channels], or [modalities, channels], which needs offsets
  OptionalTensor rows = {}, offsets = {}, cu_seqlens = {};
  OptionalTensor initial_state = {};  ///< [sequences, channels, states]
  bool softplus = true;
  bool reverse = false;  ///< walk each sequence from its last token to its first
};

/// Selective scan (arXiv 2312.00752, algorithm 2), fused with dt bias, softplus, skip and gate; per sequence
/// and channel, over its tokens in time order:
///
///     delta = softplus(dt + dt_bias[modality])
///     h     = exp(delta * A) * h + delta * u * B
///     out   = (dot(C, h) + D * u) * silu(z)
///
/// \param u, dt [batch, length, channels].
/// \param A [channels, states].
/// \param B, C [batch, length, states].
/// \return out, shaped like u, and the final state [sequences, channels, states]; both differentiable.
std::tuple<torch::Tensor, torch::Tensor> selective_scan(const torch::Tensor& u, const torch::Tensor& dt,
                                                        const torch::Tensor& A, const torch::Tensor& B,
                                                        const torch::Tensor& C,
                                                        const SelectiveScanOptions& options = {});

struct SelectiveScanStepOptions {
  OptionalTensor D = {}, z = {}, dt_bias = {}, rows = {}, offsets = {};  ///< as in SelectiveScanOptions
  bool softplus = true;
};

/// selective_scan() of one or a few tokens that updates `state` [batch, channels, states] in place; inference
/// only.
/// \param state contiguous, float32 (float64 beside float64 activations) or the dtype of a 16-bit `u`:
/// computed in float32 too, and rounded to nearest once per call.
///
/// \return out, shaped like u.
/// \throws c10::Error where an input wants a gradient, or as selective_scan() does.
torch::Tensor selective_scan_step(const torch::Tensor& u, torch::Tensor& state, const torch::Tensor& dt,
                                  const torch::Tensor& A, const torch::Tensor& B, const torch::Tensor& C,
                                  const SelectiveScanStepOptions& options = {});

}  // namespace mixture_of_mamba
