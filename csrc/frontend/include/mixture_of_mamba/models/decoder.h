// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/nn.h>
#include <torch/nn/modules/container/modulelist.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

namespace mixture_of_mamba::models {

/// Options of Decoder: Decoder(DecoderOptions(512, 8).num_modalities(3)).
struct DecoderOptions {
  DecoderOptions(int64_t d_model, int64_t layers);
  /// Width of the residual stream.
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, layers);
  /// Ids are 0 .. num_modalities - 1.
  TORCH_ARG(int64_t, num_modalities) = 2;
  /// Which projections of a mixer have one weight per modality, and "A_log" and "D"; none is dense Mamba.
  TORCH_ARG(std::vector<std::string>, decouple) = {"in_proj", "x_proj", "dt_proj", "out_proj"};
  /// Mamba blocks in one layer, each with its norm and residual; the paper's code (arXiv 2501.16295) has two.
  TORCH_ARG(int64_t, mixers_per_layer) = 2;
  /// Of every mixer, as in nn::MixtureOfMambaOptions.
  TORCH_ARG(int64_t, d_state) = 16;
  TORCH_ARG(int64_t, d_conv) = 4;
  TORCH_ARG(double, expand) = 2;
  TORCH_ARG(std::string, memory) = "default";
  TORCH_ARG(std::vector<std::string>, shared_expert) = {};
  TORCH_ARG(bool, bcdt_norm) = false;
  TORCH_ARG(std::optional<nn::MixtureOfMambaOptions::Bounds>, dt_limit) = std::nullopt;
  /// Of all RMS norms.
  TORCH_ARG(double, norm_eps) = 1e-5;
};

/// States of all mixers after some tokens. A decoder never writes into one: keeping it is a snapshot.
struct DecoderState {
  std::vector<nn::MambaState> mamba;  ///< one for each mixer, from the first layer to the last

  DecoderState clone() const;   ///< tensors of its own
  DecoderState detach() const;  ///< the same values without their history
};

/// Of one call of a decoder or of a model around it.
struct DecoderCall {
  OptionalTensor cu_seqlens = {};          ///< int32 [sequences + 1], packed documents in flat time order
  std::optional<DecoderState> state = {};  ///< where each sequence starts from; differentiable
};

/// A norm under the name that the Python package's residuals give it.
class ResidualImpl : public torch::nn::Cloneable<ResidualImpl> {
 public:
  ResidualImpl(int64_t d_model, double norm_eps);
  void reset() override;

  nn::RMSNorm norm{nullptr};

 private:
  int64_t d_model_;
  double norm_eps_;
};

TORCH_MODULE(Residual);

/// Mamba mixers one after the other, each with its norm and residual: x + mixer(norm(x)).
class MambaLayerImpl : public torch::nn::Cloneable<MambaLayerImpl> {
 public:
  explicit MambaLayerImpl(const DecoderOptions& options);
  void reset() override;

  /// \param x [batch, length, d_model], rows in the routing's sorted order.
  /// \param call its state holds this layer's mixers.
  /// \return the same shape and order, and the mixers' states after the last token.
  std::tuple<torch::Tensor, DecoderState> forward(torch::Tensor x, const Routing& routing,
                                                  const DecoderCall& call);

  DecoderOptions options;
  torch::nn::ModuleList residuals{nullptr}, mixers{nullptr};  ///< of Residual and nn::MixtureOfMamba
};

TORCH_MODULE(MambaLayer);

/// Layers of (RMSNorm -> Mamba -> residual) and a final norm: hidden states in, hidden states out.
///
/// The residual stream is in the routing's sorted order from the first layer to the last, so no layer moves a
/// row; sort token ids before the embedding and labels before the loss. Parameter names and, with a seed,
/// initial values are those of Python's mixture_of_mamba.models.Decoder. Its attention layers, pictures
/// scanned both ways and modulation are not here.
class DecoderImpl : public torch::nn::Cloneable<DecoderImpl> {
 public:
  /// \throws c10::ValueError naming the option, what was required, and what came.
  explicit DecoderImpl(const DecoderOptions& options);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// Any number of tokens: a whole sequence, a chunk of it, one token.
  /// \param x [batch, length, d_model], rows in the routing's sorted order.
  /// \return normalised hidden states with the shape and order of x. Rows of padding hold nothing of use.
  /// \throws c10::ValueError, c10::Error naming the argument, what was required, and what came.
  torch::Tensor forward(const torch::Tensor& x, const Routing& routing, const DecoderCall& call = {});

  /// forward() and the state after the last token, from which call.state goes on.
  std::tuple<torch::Tensor, DecoderState> forward_with_state(const torch::Tensor& x, const Routing& routing,
                                                             const DecoderCall& call = {});

  DecoderOptions options;
  torch::nn::ModuleList layers{nullptr};  ///< of MambaLayer
  nn::RMSNorm final_norm{nullptr};
};

TORCH_MODULE(Decoder);

}  // namespace mixture_of_mamba::models
