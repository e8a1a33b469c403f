// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/nn.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

namespace mixture_of_mamba::models {

/// Options of Decoder: Decoder(DecoderOptions(512, 65, 256, 8, 2)).
struct DecoderOptions {
  DecoderOptions(int64_t vocabulary, int64_t slots, int64_t d_model, int64_t layers, int64_t num_modalities);
  /// Tokens of all modalities share one vocabulary, as in Chameleon (arXiv 2405.09818).
  TORCH_ARG(int64_t, vocabulary);
  /// Places in a picture, and one for what is in no picture.
  TORCH_ARG(int64_t, slots);
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, layers);
  TORCH_ARG(int64_t, num_modalities);
  /// "mom" (projections per modality) or "mamba" (dense, the same FLOPs per token).
  TORCH_ARG(std::string, mixer) = "mom";
};

/// Causal language model over interleaved text and image tokens: embedding of tokens and slots,
/// layers x (RMSNorm -> mixer -> residual), norm, head tied to the embedding.
///
/// Parameter names and, with a seed, initial values are those of the twin in
/// tests/python/frontend/test_parity.py.
class DecoderImpl : public torch::nn::Cloneable<DecoderImpl> {
 public:
  /// \throws c10::ValueError an unknown mixer.
  explicit DecoderImpl(const DecoderOptions& options);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// For training: the residual stream stays sorted by modality through all layers, so no layer moves a row.
  /// \param tokens, slots integers [batch, length] in the routing's sorted order (Routing::sort).
  /// \return logits [batch, length, vocabulary], sorted.
  torch::Tensor forward(const torch::Tensor& tokens, const torch::Tensor& slots, const Routing& routing);

  /// For generation: continues sequences by any number of tokens.
  /// \param tokens, slots, modality integers [batch, length] in time order; modality -1 is padding.
  /// \param states one per layer, as returned before; empty at the beginning.
  /// \return logits of each token [batch, length, vocabulary] in time order, and the states after the last.
  std::tuple<torch::Tensor, std::vector<nn::MambaState>> advance(
      const torch::Tensor& tokens, const torch::Tensor& slots, const torch::Tensor& modality,
      const std::vector<nn::MambaState>& states = {});

  DecoderOptions options;
  torch::nn::Embedding embedding{nullptr}, slots{nullptr};
  torch::nn::ModuleList norms{nullptr}, mixers{nullptr};  ///< of nn::RMSNorm and nn::MixtureOfMamba
  nn::RMSNorm final_norm{nullptr};
};

TORCH_MODULE(Decoder);

/// Sums over the labels of a batch, float32 [2] (text, image), by the modality of the label.
struct ModalityLosses {
  torch::Tensor cross_entropy;  ///< in nats
  torch::Tensor z;              ///< squared logarithm of the softmax's denominator (z-loss, arXiv 2405.09818)
  torch::Tensor count;          ///< labels
};

/// \param logits [batch, length, vocabulary]; computed with in float32.
/// \param labels integers [batch, length]; -100 for none, image codes from `first_code` on.
ModalityLosses modality_losses(const torch::Tensor& logits, const torch::Tensor& labels, int64_t first_code);

}  // namespace mixture_of_mamba::models
