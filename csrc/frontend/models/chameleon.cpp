// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/models/chameleon.h"

#include "text.h"

namespace mixture_of_mamba::models {

using frontend::require_value;

static constexpr double kEmbeddingStd = 0.02;

ChameleonOptions::ChameleonOptions(DecoderOptions decoder, Vocabulary vocabulary)
    : decoder_(std::move(decoder)), vocabulary_(std::move(vocabulary)) {}

ChameleonImpl::ChameleonImpl(const ChameleonOptions& options_) : options(options_) {
  const int64_t expected = options.vocabulary().num_modalities();
  require_value(options.decoder().num_modalities() == expected,
                "config.num_modalities must be the vocabulary's, {}, got {}", expected,
                options.decoder().num_modalities());
  ChameleonImpl::reset();
}

void ChameleonImpl::reset() {
  const int64_t size = options.vocabulary().size(), d_model = options.decoder().d_model();
  embedding = register_module("embedding", torch::nn::Embedding(size, d_model));
  decoder = register_module("decoder", Decoder(options.decoder()));
  head = nullptr;
  if (!options.tied()) {
    head = register_module("head", torch::nn::Linear(torch::nn::LinearOptions(d_model, size).bias(false)));
  }
  torch::NoGradGuard no_grad;
  embedding->weight.normal_(0, kEmbeddingStd);
  if (head) head->weight.normal_(0, kEmbeddingStd);
}

void ChameleonImpl::pretty_print(std::ostream& stream) const {
  stream << fmt::format("mixture_of_mamba::models::Chameleon(vocabulary={}, tied={})",
                        options.vocabulary().size(), options.tied());
}

Routing ChameleonImpl::routing(const torch::Tensor& tokens, const TokenModality& modality) const {
  const bool integers = c10::isIntegralType(tokens.scalar_type(), /*includeBool=*/true);
  require_value(tokens.dim() == 2 && integers, "tokens must be integers [batch, length], got {} {}",
                frontend::dtype_of(tokens), frontend::shape_of(tokens));
  if (const auto* given = std::get_if<Routing>(&modality)) return *given;
  const auto* given = std::get_if<torch::Tensor>(&modality);
  const torch::Tensor ids = given == nullptr ? options.vocabulary().modality_of(tokens) : *given;
  require_value(ids.sizes() == tokens.sizes(), "modality must have the shape of tokens, {}, got {}",
                frontend::shape_of(tokens), frontend::shape_of(ids));
  return Routing::from_ids(ids, options.vocabulary().num_modalities(), {.device = tokens.device()});
}

torch::Tensor ChameleonImpl::forward(const torch::Tensor& tokens, const TokenModality& modality,
                                     const DecoderCall& call) {
  return std::get<0>(forward_with_state(tokens, modality, call));
}

std::tuple<torch::Tensor, DecoderState> ChameleonImpl::forward_with_state(const torch::Tensor& tokens,
                                                                          const TokenModality& modality,
                                                                          const DecoderCall& call) {
  const Routing route = routing(tokens, modality);
  auto [hidden, state] = decoder->forward_with_state(embedded(tokens, route), route, call);
  return {logits(route.unsort(hidden)), state};
}

ModalityLosses ChameleonImpl::loss(const torch::Tensor& tokens, const TokenModality& modality,
                                   const OptionalTensor& cu_seqlens) {
  const Routing route = routing(tokens, modality);
  const torch::Tensor hidden = decoder->forward(embedded(tokens, route), route, {.cu_seqlens = cu_seqlens});
  const torch::Tensor labels = route.sort(next_tokens(tokens, cu_seqlens));
  const Vocabulary& vocabulary = options.vocabulary();
  return modality_losses(logits(hidden), labels, vocabulary.modality_of(labels), vocabulary.num_modalities());
}

torch::Tensor ChameleonImpl::embedded(const torch::Tensor& tokens, const Routing& routing) {
  return embedding->forward(routing.sort(tokens).clamp_min(0));
}

torch::Tensor ChameleonImpl::logits(const torch::Tensor& hidden) {
  return torch::linear(hidden, head ? head->weight : embedding->weight);
}

}  // namespace mixture_of_mamba::models
