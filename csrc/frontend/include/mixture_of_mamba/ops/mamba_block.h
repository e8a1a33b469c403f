// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/ops/optional_tensor.h>
#include <torch/types.h>

#include <tuple>
#include <vector>

namespace mixture_of_mamba {

/// Of a block: lists hold one tensor for all rows or one per modality.
struct MambaBlockParameters {
  std::vector<torch::Tensor> in_weight;   ///< [2 * d_inner, d_model]
  std::vector<torch::Tensor> in_bias;     ///< [2 * d_inner], or empty
  torch::Tensor conv_weight;              ///< [d_inner, width]
  OptionalTensor conv_bias = {};          ///< [d_inner]
  std::vector<torch::Tensor> x_weight;    ///< [dt_rank + 2 * d_state, d_inner]
  std::vector<torch::Tensor> dt_weight;   ///< [d_inner, dt_rank]
  std::vector<torch::Tensor> dt_bias;     ///< [d_inner], or empty
  torch::Tensor A_log, D;                 ///< [d_inner, d_state], [d_inner]
  std::vector<torch::Tensor> out_weight;  ///< [d_model, d_inner]
  std::vector<torch::Tensor> out_bias;    ///< [d_model], or empty
};

struct MambaBlockOptions {
  OptionalTensor rows = {}, offsets = {};
  OptionalTensor host_offsets = {};  ///< with offsets on a GPU needed where a list holds one for all
  OptionalTensor cu_seqlens = {};
  OptionalTensor conv_state = {};  ///< [sequences, width - 1, d_inner], where each sequence starts from
  OptionalTensor ssm_state = {};   ///< [sequences, d_inner, d_state]
  bool lean = false;               ///< keep less for backward and compute it again there
};

/// The Mamba block (arXiv 2312.00752, figure 3) with projections per modality (arXiv 2501.16295) as one
/// operator.
/// \param x [batch, length, d_model], rows in sorted order when `rows` is given.
/// \return y [batch, length, d_model], the convolution's state [sequences, width - 1, d_inner] and the scan's
/// [sequences, d_inner, d_state] after the last token; all differentiable.
/// \throws c10::Error naming the argument, what was required, and what came.
std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> mamba_block(const torch::Tensor& x,
                                                                    const MambaBlockParameters& parameters,
                                                                    const MambaBlockOptions& options = {});

struct MambaBlockStepOptions {
  OptionalTensor rows = {}, offsets = {};
  OptionalTensor host_offsets = {};  ///< with offsets on a GPU needed where a list holds one for all
};

/// mamba_block() of one or a few tokens that updates both states in place, for inference only.
/// \param conv_state [batch, width - 1, d_inner], contiguous, in the dtype of x.
/// \param ssm_state [batch, d_inner, d_state], contiguous, float32 (float64 for float64), or a 16-bit dtype
/// of x, rounded once per call.
///
/// \return y [batch, length, d_model].
/// \throws c10::Error as mamba_block() does, and where a gradient would be recorded.
torch::Tensor mamba_block_step(const torch::Tensor& x, torch::Tensor& conv_state, torch::Tensor& ssm_state,
                               const MambaBlockParameters& parameters,
                               const MambaBlockStepOptions& options = {});

}  // namespace mixture_of_mamba
