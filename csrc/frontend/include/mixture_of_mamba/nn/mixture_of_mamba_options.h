// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/arg.h>
#include <torch/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace mixture_of_mamba::nn {

/// Options of MixtureOfMamba: MixtureOfMamba(MixtureOfMambaOptions(1024, 2).decouple({"in_proj",
/// "out_proj"})).
struct MixtureOfMambaOptions {
  using Bounds = std::pair<double, double>;

  MixtureOfMambaOptions(int64_t d_model, int64_t num_modalities);
  /// Width of the residual stream.
  TORCH_ARG(int64_t, d_model);
  /// Ids are 0 .. num_modalities - 1.
  TORCH_ARG(int64_t, num_modalities);
  /// Which of in_proj, x_proj, dt_proj and out_proj are per modality; any of the 16 subsets. With "D" among
  /// them D is [num_modalities, d_inner]: the scan leaves the skip to elementwise operators, and the block is
  /// the operators one by one. With "A_log" A_log is [num_modalities, d_inner, d_state], meant for ablations:
  /// the scan then keeps several activations of d_inner * d_state per token and takes several times the time.
  TORCH_ARG(std::vector<std::string>, decouple) = {"in_proj", "x_proj", "dt_proj", "out_proj"};
  /// Which of the decoupled projections have one more matrix for the tokens of all modalities, see
  /// ModalityLinearOptions::shared_expert.
  TORCH_ARG(std::vector<std::string>, shared_expert) = {};
  /// State size per channel.
  TORCH_ARG(int64_t, d_state) = 16;
  /// Width of the causal convolution.
  TORCH_ARG(int64_t, d_conv) = 4;
  /// d_inner = expand * d_model.
  TORCH_ARG(double, expand) = 2;
  /// By default d_model / 16, rounded up.
  TORCH_ARG(std::optional<int64_t>, dt_rank) = std::nullopt;
  /// The range of delta before training, and how dt_proj begins ("random" or "constant").
  TORCH_ARG(double, dt_min) = 0.001;
  TORCH_ARG(double, dt_max) = 0.1;
  TORCH_ARG(std::string, dt_init) = "random";
  TORCH_ARG(double, dt_scale) = 1.0;
  TORCH_ARG(double, dt_init_floor) = 1e-4;
  /// Of the convolution.
  TORCH_ARG(bool, conv_bias) = true;
  /// Of in_proj and out_proj.
  TORCH_ARG(bool, bias) = false;
  /// "default", or "lean": keep fewer activations for backward and compute them again there.
  TORCH_ARG(std::string, memory) = "default";
  /// RMS norms with weights on B, C and the low-rank dt (Jamba's: b_layernorm, c_layernorm, dt_layernorm).
  TORCH_ARG(bool, bcdt_norm) = false;
  /// Bounds (low, high) on delta = softplus(dt + bias). With a norm or a limit the block is the operators one
  /// by one.
  TORCH_ARG(std::optional<Bounds>, dt_limit) = std::nullopt;
  /// Of the parameters; A_log and D are float32 whatever the dtype.
  TORCH_ARG(std::optional<torch::Device>, device) = std::nullopt;
  TORCH_ARG(std::optional<torch::Dtype>, dtype) = std::nullopt;

 public:
  /// Channels of the convolution and the scan: expand * d_model, rounded down.
  int64_t d_inner() const;
  /// dt_rank() with its default filled in.
  int64_t rank() const;
};

}  // namespace mixture_of_mamba::nn
