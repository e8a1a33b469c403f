// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <mixture_of_mamba/models.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cstdint>
#include <string>

#include "failure.h"
#include "torch_file.h"

namespace examples {

/// The state dict in a checkpoint: under "model", or the dict itself. What chameleon.py trains holds the
/// model under a name, which is taken off.
inline Dict weights_of(const Dict& checkpoint) {
  const auto found = checkpoint.find("model");
  const Dict weights = found == checkpoint.end() ? checkpoint : found->value().toGenericDict();
  const std::string wrapper = "model.";
  Dict bare = make_dict();
  for (const auto& entry : weights) {
    if (!entry.key().isString() || !entry.value().isTensor())
      throw Failure("the weights must be named tensors");
    const std::string name = entry.key().toStringRef();
    bare.insert(name.starts_with(wrapper) ? name.substr(wrapper.size()) : name, entry.value());
  }
  return bare;
}

inline torch::Tensor weight(const Dict& weights, const std::string& name) {
  const auto found = weights.find(name);
  if (found == weights.end()) throw Failure("the weights are not a Chameleon's: they lack " + name);
  return found->value().toTensor();
}

/// A model's options from the shapes of its weights.
inline mixture_of_mamba::models::ChameleonOptions options_of(
    const Dict& weights, const mixture_of_mamba::models::Vocabulary& vocabulary) {
  const std::string first = "decoder.layers.0.mixers.0.";
  int64_t layers = 0, mixers = 0;
  while (weights.contains(fmt::format("decoder.layers.{}.mixers.0.A_log", layers))) ++layers;
  while (weights.contains(fmt::format("decoder.layers.0.mixers.{}.A_log", mixers))) ++mixers;
  std::vector<std::string> decouple;
  for (const char* name : {"in_proj", "x_proj", "dt_proj", "out_proj"}) {
    if (weights.contains(first + name + ".0.weight")) decouple.push_back(name);
  }
  auto options = mixture_of_mamba::models::DecoderOptions(weight(weights, "embedding.weight").size(1), layers)
                     .num_modalities(vocabulary.num_modalities())
                     .decouple(decouple)
                     .mixers_per_layer(mixers)
                     .d_state(weight(weights, first + "A_log").size(1))
                     .d_conv(weight(weights, first + "conv1d.weight").size(2));
  return mixture_of_mamba::models::ChameleonOptions(options, vocabulary)
      .tied(!weights.contains("head.weight"));
}

inline Dict state_dict(const mixture_of_mamba::models::Chameleon& model) {
  Dict weights = make_dict();
  for (const auto& entry : model->named_parameters())
    weights.insert(entry.key(), entry.value().detach().cpu());
  return weights;
}

/// Copies all weights; names and shapes must be the model's.
inline void load_state_dict(mixture_of_mamba::models::Chameleon& model, const Dict& weights) {
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
