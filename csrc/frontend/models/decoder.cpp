// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/models/decoder.h"

#include <torch/nn/functional/loss.h>

#include <cmath>

#include "text.h"

namespace mixture_of_mamba::models {

namespace {

constexpr double kInitStd = 0.02;
constexpr double kNormEps = 1e-5;
constexpr int64_t kNoLabel = -100;

nn::MixtureOfMamba make_mixer(const DecoderOptions& options) {
  if (options.mixer() == "mom") return nn::MixtureOfMamba(options.d_model(), options.num_modalities());
  return nn::MixtureOfMamba(nn::Mamba(options.d_model()).ptr());
}

torch::Tensor normalised(torch::nn::ModuleList& norms, size_t layer, const torch::Tensor& x) {
  return norms->at<nn::RMSNormImpl>(layer).forward(x);
}

}  // namespace

DecoderOptions::DecoderOptions(int64_t vocabulary, int64_t slots, int64_t d_model, int64_t layers,
                               int64_t num_modalities)
    : vocabulary_(vocabulary),
      slots_(slots),
      d_model_(d_model),
      layers_(layers),
      num_modalities_(num_modalities) {}

DecoderImpl::DecoderImpl(const DecoderOptions& options_) : options(options_) {
  frontend::require_value(options.mixer() == "mom" || options.mixer() == "mamba",
                          "mixer must be \"mom\" or \"mamba\", got '{}'", options.mixer());
  DecoderImpl::reset();
}

void DecoderImpl::reset() {
  const int64_t d_model = options.d_model();
  embedding = register_module("embedding", torch::nn::Embedding(options.vocabulary(), d_model));
  slots = register_module("slots", torch::nn::Embedding(options.slots(), d_model));
  norms = register_module("norms", torch::nn::ModuleList());
  mixers = register_module("mixers", torch::nn::ModuleList());
  for (int64_t layer = 0; layer < options.layers(); ++layer) {
    norms->push_back(nn::RMSNorm(nn::RMSNormOptions(d_model).eps(kNormEps)));
    mixers->push_back(make_mixer(options));
  }
  final_norm = register_module("final_norm", nn::RMSNorm(nn::RMSNormOptions(d_model).eps(kNormEps)));
  torch::NoGradGuard no_grad;
  embedding->weight.normal_(0, kInitStd);
  slots->weight.normal_(0, kInitStd);
  // Residual branches add up: each begins smaller, the more there are (GPT-2).
  for (const auto& mixer : *mixers) {
    for (torch::Tensor& weight : mixer->as<nn::MixtureOfMambaImpl>()->out_proj.weights()) {
      weight.mul_(std::pow(2.0 * static_cast<double>(options.layers()), -0.5));
    }
  }
}

void DecoderImpl::pretty_print(std::ostream& stream) const {
  stream << fmt::format("mixture_of_mamba::models::Decoder(vocabulary={}, d_model={}, layers={}, mixer={})",
                        options.vocabulary(), options.d_model(), options.layers(), options.mixer());
}

torch::Tensor DecoderImpl::forward(const torch::Tensor& tokens, const torch::Tensor& slot_ids,
                                   const Routing& routing) {
  torch::Tensor x = embedding->forward(tokens) + slots->forward(slot_ids);
  for (size_t layer = 0; layer < mixers->size(); ++layer) {
    auto& mixer = mixers->at<nn::MixtureOfMambaImpl>(layer);
    x = x + mixer.forward(normalised(norms, layer, x), routing, {.sorted = true});
  }
  return torch::linear(final_norm->forward(x), embedding->weight);
}

std::tuple<torch::Tensor, std::vector<nn::MambaState>> DecoderImpl::advance(
    const torch::Tensor& tokens, const torch::Tensor& slot_ids, const torch::Tensor& modality,
    const std::vector<nn::MambaState>& states) {
  frontend::require_value(states.empty() || states.size() == mixers->size(),
                          "states must be empty or hold one state for each of the {} layers, got {}",
                          mixers->size(), states.size());
  const Routing routing = Routing::from_ids(modality, options.num_modalities(), {.device = tokens.device()});
  torch::Tensor x = embedding->forward(tokens) + slots->forward(slot_ids);
  std::vector<nn::MambaState> new_states;
  for (size_t layer = 0; layer < mixers->size(); ++layer) {
    nn::MixOptions call;
    if (!states.empty()) call.state = states[layer];
    auto& mixer = mixers->at<nn::MixtureOfMambaImpl>(layer);
    auto [y, state] = mixer.forward_with_state(normalised(norms, layer, x), routing, call);
    x = x + y;
    new_states.push_back(state);
  }
  return {torch::linear(final_norm->forward(x), embedding->weight), new_states};
}

ModalityLosses modality_losses(const torch::Tensor& logits, const torch::Tensor& labels, int64_t first_code) {
  namespace F = torch::nn::functional;
  const torch::Tensor target = labels.flatten(), wide = logits.flatten(0, 1).to(torch::kFloat32);
  const auto each = F::CrossEntropyFuncOptions().ignore_index(kNoLabel).reduction(torch::kNone);
  const torch::Tensor cross_entropy = F::cross_entropy(wide, target, each);
  const torch::Tensor image = target >= first_code, text = (target != kNoLabel) & image.logical_not();
  const torch::Tensor masks = torch::stack({text, image}).to(torch::kFloat32);
  const torch::Tensor squared_log_z = wide.logsumexp(-1).square();
  return {(masks * cross_entropy).sum(1), (masks * squared_log_z).sum(1), masks.sum(1)};
}

}  // namespace mixture_of_mamba::models
