// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <mixture_of_mamba/models/decoder.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cstdint>
#include <string>

#include "failure.h"
#include "torch_file.h"

namespace examples {

/// The state dict in a checkpoint: under "model", or the dict itself.
inline Dict weights_of(const Dict& checkpoint) {
  const auto found = checkpoint.find("model");
  return found == checkpoint.end() ? checkpoint : found->value().toGenericDict();
}

inline torch::Tensor weight(const Dict& weights, const std::string& name) {
  const auto found = weights.find(name);
  if (found == weights.end()) throw Failure("the weights are not a Decoder's: they lack " + name);
  return found->value().toTensor();
}

/// A decoder's options from the shapes of its weights.
inline mixture_of_mamba::models::DecoderOptions options_of(const Dict& weights) {
  const torch::Tensor embedding = weight(weights, "embedding.weight"),
                      slots = weight(weights, "slots.weight");
  int64_t layers = 0, modalities = 0;
  while (weights.contains(fmt::format("norms.{}.weight", layers))) ++layers;
  while (weights.contains(fmt::format("mixers.0.in_proj.{}.weight", modalities))) ++modalities;
  auto options = mixture_of_mamba::models::DecoderOptions(embedding.size(0), slots.size(0), embedding.size(1),
                                                          layers, modalities == 0 ? 2 : modalities);
  return options.mixer(modalities == 0 ? "mamba" : "mom");
}

inline Dict state_dict(const mixture_of_mamba::models::Decoder& model) {
  Dict weights = make_dict();
  for (const auto& entry : model->named_parameters())
    weights.insert(entry.key(), entry.value().detach().cpu());
  return weights;
}

/// Copies all weights; names and shapes must be the model's.
inline void load_state_dict(mixture_of_mamba::models::Decoder& model, const Dict& weights) {
  torch::NoGradGuard no_grad;
  const auto parameters = model->named_parameters();
  for (const auto& entry : parameters) {
    const torch::Tensor value = weight(weights, entry.key());
    if (value.sizes() != entry.value().sizes()) {
      throw Failure(fmt::format("{} must have shape {}, got {}", entry.key(), entry.value().sizes().vec(),
                                value.sizes().vec()));
    }
    torch::Tensor(entry.value()).copy_(value);
  }
  for (const auto& entry : weights) {
    const std::string name = entry.key().toStringRef();
    if (!parameters.contains(name))
      throw Failure("the model has no parameter " + name + ", which the weights hold");
  }
}

}  // namespace examples
