// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

/// \file
/// The operators as C++ functions that record gradients. Every function goes through torch's dispatcher, so
/// autocast, profilers and torch::NoGradGuard work as for torch's own. Errors are c10::Error
/// (what_without_backtrace() is the text) and name the argument, what was required, and what came.
///
/// Words: `rows` int32 [batch * length], time -> row; `offsets` int32 [modalities + 1], modality m owns rows
/// offsets[m] .. offsets[m + 1], rows beyond the last are padding; `host_offsets` the same as int64 on the
/// CPU; `cu_seqlens` int32 [sequences + 1], boundaries of packed sequences in flat time order. Sequences are
/// the rows of the batch where there is no cu_seqlens. See Routing, which makes the first three.
///
/// Parameters, states and all arithmetic of the scan are float32 (float64 beside float64 activations, CPU
/// only).

namespace mixture_of_mamba {

using OptionalTensor = std::optional<torch::Tensor>;

/// Registers the operators' autograd, meta and autocast kernels of C++, once per process. All functions and
/// modules here call it; call it yourself before using the operators through torch's dispatcher alone.
///
/// Where the Python package has been imported its registrations stand, and these keep out.
/// \return whether the registrations of C++ are this process's.
bool initialize();

/// Instruction set of the CPU kernels that this machine runs: "baseline", "avx2" or "avx512".
std::string cpu_isa();

/// Stable sort of tokens by modality, padding last.
/// \param ids integers of any shape; 0 .. num_modalities - 1, or -1 for padding.
/// \param num_modalities 1 .. 1024.
/// \param checked refuse ids out of range; on a GPU, as with false, they are padding.
/// \return rows, order (its inverse), offsets.
std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> modality_routing(const torch::Tensor& ids,
                                                                         int64_t num_modalities,
                                                                         bool checked = true);

/// out[i] = x[index[i]] over the rows of x [..., channels]; the gradient is the gather by `inverse`.
/// \param index, inverse int32 [rows], a permutation and its inverse.
torch::Tensor permute_rows(const torch::Tensor& x, const torch::Tensor& index, const torch::Tensor& inverse);

/// y[rows of m] = x[rows of m] @ weight[m].T + bias[m]; padding rows are 0.
/// \param x [..., in_features], rows in sorted order.
/// \param weight one [out_features, in_features] per modality, cast to the dtype of x.
/// \param bias one [out_features] per modality, or empty.
/// \param host_offsets with it the operator is a loop of plain GEMMs; without, on a GPU, all stays on the
/// device.
torch::Tensor grouped_linear(const torch::Tensor& x, at::TensorList weight, at::TensorList bias,
                             const torch::Tensor& offsets, const OptionalTensor& host_offsets = {});

struct CausalConv1dOptions {
  OptionalTensor rows = {}, offsets = {}, cu_seqlens = {};
  OptionalTensor initial_state =
      {};  ///< [sequences, width - 1, channels], inputs before the first token, oldest first
  bool silu = true;
};

/// Depthwise causal convolution, optionally followed by SiLU.
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
torch::Tensor causal_conv1d_step(const torch::Tensor& x, torch::Tensor& state, const torch::Tensor& weight,
                                 const OptionalTensor& bias = {},
                                 const CausalConv1dStepOptions& options = {});

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
torch::Tensor selective_scan_step(const torch::Tensor& u, torch::Tensor& state, const torch::Tensor& dt,
                                  const torch::Tensor& A, const torch::Tensor& B, const torch::Tensor& C,
                                  const SelectiveScanStepOptions& options = {});

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
  OptionalTensor host_offsets = {};  ///< needed with offsets on a GPU
  OptionalTensor cu_seqlens = {};
  OptionalTensor conv_state = {};  ///< [sequences, width - 1, d_inner], where each sequence starts from
  OptionalTensor ssm_state = {};   ///< [sequences, d_inner, d_state]
  bool lean = false;               ///< keep less for backward and compute it again there
};

/// The Mamba block (arXiv 2312.00752, figure 3) with projections per modality (arXiv 2501.16295) as one
/// operator. \param x [batch, length, d_model], rows in sorted order when `rows` is given. \return y [batch,
/// length, d_model] and the two states after the last token; all differentiable.
std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> mamba_block(const torch::Tensor& x,
                                                                    const MambaBlockParameters& parameters,
                                                                    const MambaBlockOptions& options = {});

}  // namespace mixture_of_mamba
