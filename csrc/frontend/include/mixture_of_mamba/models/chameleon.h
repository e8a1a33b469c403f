// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/models/decoder.h>
#include <mixture_of_mamba/models/losses.h>
#include <mixture_of_mamba/models/vocabulary.h>
#include <torch/nn/modules/embedding.h>

#include <tuple>
#include <variant>

namespace mixture_of_mamba::models {

/// Options of Chameleon: Chameleon(ChameleonOptions(DecoderOptions(512, 8), vocabulary).tied(true)).
struct ChameleonOptions {
  ChameleonOptions(DecoderOptions decoder, Vocabulary vocabulary);
  TORCH_ARG(DecoderOptions, decoder);
  TORCH_ARG(Vocabulary, vocabulary);
  /// The head is the embedding.
  TORCH_ARG(bool, tied) = false;
};

/// What says the modalities of tokens: nothing (their ids do), modality ids [batch, length] with -1 for
/// padding, or a Routing of those. Made on the CPU they spare a GPU what is not known on the host.
using TokenModality = std::variant<std::monostate, torch::Tensor, Routing>;

/// Chameleon (arXiv 2405.09818): causal language model over the tokens of all modalities in one vocabulary.
///
/// Token ids are in time order, and -1 is padding: left, right or in between. Parameter names and, with a
/// seed, initial values are those of Python's mixture_of_mamba.models.Chameleon.
class ChameleonImpl : public torch::nn::Cloneable<ChameleonImpl> {
 public:
  /// \throws c10::ValueError a decoder of another number of modalities than the vocabulary's.
  explicit ChameleonImpl(const ChameleonOptions& options);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// The routing of tokens, integers [batch, length], for their device.
  Routing routing(const torch::Tensor& tokens, const TokenModality& modality = {}) const;

  /// \param tokens int64 [batch, length], a whole sequence or the next chunk of it.
  /// \return logits [batch, length, vocabulary] of the token after each, in time order; anything on padding.
  torch::Tensor forward(const torch::Tensor& tokens, const TokenModality& modality = {},
                        const DecoderCall& call = {});

  /// forward() and the state after the last token, from which call.state goes on: generation.
  std::tuple<torch::Tensor, DecoderState> forward_with_state(const torch::Tensor& tokens,
                                                             const TokenModality& modality = {},
                                                             const DecoderCall& call = {});

  /// Next-token losses by modality of the label; total() of them is what is minimised.
  /// Every token is input; labels are sorted and hidden states are not moved.
  ModalityLosses loss(const torch::Tensor& tokens, const TokenModality& modality = {},
                      const OptionalTensor& cu_seqlens = {});

  ChameleonOptions options;
  torch::nn::Embedding embedding{nullptr};
  Decoder decoder{nullptr};
  torch::nn::Linear head{nullptr};  ///< none when tied

 private:
  torch::Tensor embedded(const torch::Tensor& tokens, const Routing& routing);
  torch::Tensor logits(const torch::Tensor& hidden);
};

TORCH_MODULE(Chameleon);

}  // namespace mixture_of_mamba::models
