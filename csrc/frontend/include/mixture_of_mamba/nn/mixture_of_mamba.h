// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/nn/mixture_of_mamba_options.h>
#include <mixture_of_mamba/nn/modality_linear.h>
#include <mixture_of_mamba/nn/rms_norm.h>
#include <mixture_of_mamba/nn/state.h>
#include <mixture_of_mamba/routing.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

namespace mixture_of_mamba::nn {

/// A projection of the block: one torch::nn::Linear for all rows, or a ModalityLinear.
struct Projection {
  torch::nn::Linear shared{nullptr};
  ModalityLinear decoupled{nullptr};

  /// The one for all, or one per modality (without a shared expert, which is `decoupled->shared`).
  std::vector<torch::nn::Linear> linears() const;
  /// Their matrices [out_features, in_features]; a shared expert is added to each.
  std::vector<torch::Tensor> weights() const;
  /// Their vectors [out_features]; empty when there are none.
  std::vector<torch::Tensor> biases() const;
};

/// What routes a call's tokens: nothing (a layer of one modality), ids [batch, length] with -1 for padding, a
/// Routing of them made once per batch, or the one modality of all tokens.
using Modality = std::variant<std::monostate, torch::Tensor, Routing, int64_t>;

/// Of one call of a block.
struct MixOptions {
  bool sorted = false;  ///< x is, and y shall be, in the routing's sorted order
  std::optional<torch::Tensor> cu_seqlens =
      {};                                ///< int32 [sequences + 1], packed documents in flat time order
  std::optional<MambaState> state = {};  ///< where each sequence starts from; differentiable
};

/// The Mamba block (arXiv 2312.00752) whose projections may be per modality (arXiv 2501.16295); the
/// convolution is shared by all, A and D unless asked.
///
/// Parameter names are those of mamba_ssm.Mamba; a decoupled projection holds one Linear per modality
/// (in_proj.0.weight, in_proj.1.weight, ..., and in_proj.shared.weight). With a seed, parameters begin as
/// those of the Python layer do.
class MixtureOfMambaImpl : public torch::nn::Cloneable<MixtureOfMambaImpl> {
 public:
  /// All four projections per modality, everything else as MixtureOfMambaOptions says.
  MixtureOfMambaImpl(int64_t d_model, int64_t num_modalities);
  /// \throws c10::ValueError naming the option, what was required, and what came.
  explicit MixtureOfMambaImpl(const MixtureOfMambaOptions& options);

  void reset() override;
  /// As in the Mamba paper: dt in [dt_min, dt_max] per modality, A = -(1 .. d_state), D = 1.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// Mixes tokens along time; any length.
  /// \param x [batch, length, d_model] of a floating type on the layer's device, in time order, or with rows
  /// in sorted order when options.sorted. \param modality see Modality. A layer of one modality takes ids of
  /// many for that one. \return y with the shape, order and dtype of x; padding rows are 0. \throws
  /// c10::ValueError, c10::Error naming the argument, what was required, and what came.
  torch::Tensor forward(const torch::Tensor& x, const Modality& modality = {},
                        const MixOptions& options = {});

  /// forward() and the state after the last token, from which options.state goes on; prefill and continuation
  /// alike.
  std::tuple<torch::Tensor, MambaState> forward_with_state(const torch::Tensor& x,
                                                           const Modality& modality = {},
                                                           const MixOptions& options = {});

  /// Decodes one or a few tokens; inference only.
  /// \param x [batch, length, d_model] in time order.
  /// \param state of `batch` sequences, of allocate_state() or forward_with_state(); updated in place.
  /// \return y with the shape of x.
  /// \throws c10::ValueError, c10::Error naming the argument, what was required, and what came.
  torch::Tensor step(const torch::Tensor& x, MambaState& state, const Modality& modality = {});

  /// The state before the first token, on the layer's device.
  /// \param batch sequences, 0 or more.
  /// \param dtype that of the activations, by default the weights'.
  /// \param ssm_dtype that of the scan's part: float32 (float64 for float64), or `dtype` where that has 16
  /// bits. It then has half of the bytes, and every step rounds it.
  /// \throws c10::ValueError a negative batch, a dtype that is not floating, or another ssm_dtype.
  MambaState allocate_state(int64_t batch, std::optional<torch::Dtype> dtype = {},
                            std::optional<torch::Dtype> ssm_dtype = {}) const;

  /// A_log, D and the biases of dt_proj: what an optimiser should not decay.
  std::vector<torch::Tensor> parameters_without_weight_decay() const;

  MixtureOfMambaOptions options;
  Projection in_proj, x_proj, dt_proj, out_proj;
  torch::nn::Conv1d conv1d{nullptr};
  torch::Tensor A_log;  ///< float32 [d_inner, d_state], or one per modality in front
  torch::Tensor D;      ///< float32 [d_inner], or one per modality in front
  RMSNorm dt_layernorm{nullptr}, b_layernorm{nullptr}, c_layernorm{nullptr};  ///< none without bcdt_norm

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(Modality())}, {2, torch::nn::AnyValue(MixOptions())})

 private:
  Projection make_projection(const std::string& name, int64_t in_features, int64_t out_features, bool bias);
};

TORCH_MODULE(MixtureOfMamba);

}  // namespace mixture_of_mamba::nn
