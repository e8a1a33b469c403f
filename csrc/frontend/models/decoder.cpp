// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/models/decoder.h"

#include <cmath>

#include "nn/names.h"
#include "text.h"

namespace mixture_of_mamba::models {

using frontend::require_value;

static void check(const DecoderOptions& options) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"d_model", options.d_model()},
      {"layers", options.layers()},
      {"num_modalities", options.num_modalities()},
      {"mixers_per_layer", options.mixers_per_layer()},
      {"d_state", options.d_state()},
      {"d_conv", options.d_conv()},
  };
  for (const auto& [name, value] : sizes) {
    require_value(value >= 1, "{} must be an integer of at least 1, got {}", name, value);
  }
  frontend::check_names("decouple", options.decouple(), frontend::kDecoupled);
  require_value(options.norm_eps() > 0, "norm_eps must be positive, got {}",
                frontend::text_of(options.norm_eps()));
}

static nn::MixtureOfMamba make_mixer(const DecoderOptions& options) {
  return nn::MixtureOfMamba(nn::MixtureOfMambaOptions(options.d_model(), options.num_modalities())
                                .decouple(options.decouple())
                                .d_state(options.d_state())
                                .d_conv(options.d_conv())
                                .expand(options.expand())
                                .memory(options.memory())
                                .shared_expert(options.shared_expert())
                                .bcdt_norm(options.bcdt_norm())
                                .dt_limit(options.dt_limit()));
}

DecoderOptions::DecoderOptions(int64_t d_model, int64_t layers) : d_model_(d_model), layers_(layers) {}

DecoderState DecoderState::clone() const {
  DecoderState copy;
  for (const nn::MambaState& one : mamba) copy.mamba.push_back(one.clone());
  return copy;
}

DecoderState DecoderState::detach() const {
  DecoderState copy;
  for (const nn::MambaState& one : mamba) copy.mamba.push_back(one.detach());
  return copy;
}

ResidualImpl::ResidualImpl(int64_t d_model, double norm_eps) : d_model_(d_model), norm_eps_(norm_eps) {
  ResidualImpl::reset();
}

void ResidualImpl::reset() {
  norm = register_module("norm", nn::RMSNorm(nn::RMSNormOptions(d_model_).eps(norm_eps_)));
}

MambaLayerImpl::MambaLayerImpl(const DecoderOptions& options_) : options(options_) {
  MambaLayerImpl::reset();
}

void MambaLayerImpl::reset() {
  residuals = register_module("residuals", torch::nn::ModuleList());
  mixers = register_module("mixers", torch::nn::ModuleList());
  for (int64_t i = 0; i < options.mixers_per_layer(); ++i) {
    residuals->push_back(Residual(options.d_model(), options.norm_eps()));
    mixers->push_back(make_mixer(options));
  }
}

std::tuple<torch::Tensor, DecoderState> MambaLayerImpl::forward(torch::Tensor x, const Routing& routing,
                                                                const DecoderCall& call) {
  DecoderState after;
  for (size_t i = 0; i < mixers->size(); ++i) {
    nn::MixOptions mix{.sorted = true, .cu_seqlens = call.cu_seqlens};
    if (call.state) mix.state = call.state->mamba[i];
    const torch::Tensor h = residuals->at<ResidualImpl>(i).norm->forward(x);
    auto [y, state] = mixers->at<nn::MixtureOfMambaImpl>(i).forward_with_state(h, routing, mix);
    x = x + y;
    after.mamba.push_back(std::move(state));
  }
  return {x, after};
}

DecoderImpl::DecoderImpl(const DecoderOptions& options_) : options(options_) {
  check(options);
  DecoderImpl::reset();
}

void DecoderImpl::reset() {
  layers = register_module("layers", torch::nn::ModuleList());
  for (int64_t i = 0; i < options.layers(); ++i) layers->push_back(MambaLayer(options));
  const auto norm = nn::RMSNormOptions(options.d_model()).eps(options.norm_eps());
  final_norm = register_module("final_norm", nn::RMSNorm(norm));
  // What is added to the stream shrinks with the number of additions (GPT-2).
  torch::NoGradGuard no_grad;
  const auto additions = static_cast<double>(options.layers() * options.mixers_per_layer());
  for (const auto& layer : *layers) {
    for (const auto& mixer : *layer->as<MambaLayerImpl>()->mixers) {
      for (auto& parameter : mixer->named_parameters()) {
        const std::string& name = parameter.key();
        if (name.starts_with("out_proj.") && name.ends_with("weight"))
          parameter.value().mul_(std::pow(additions, -0.5));
      }
    }
  }
}

void DecoderImpl::pretty_print(std::ostream& stream) const {
  stream << fmt::format(
      "mixture_of_mamba::models::Decoder(d_model={}, layers={}, num_modalities={}, decouple=[{}])",
      options.d_model(), options.layers(), options.num_modalities(), fmt::join(options.decouple(), ", "));
}

torch::Tensor DecoderImpl::forward(const torch::Tensor& x, const Routing& routing, const DecoderCall& call) {
  return std::get<0>(forward_with_state(x, routing, call));
}

std::tuple<torch::Tensor, DecoderState> DecoderImpl::forward_with_state(const torch::Tensor& x,
                                                                        const Routing& routing,
                                                                        const DecoderCall& call) {
  require_value(x.dim() == 3 && x.size(2) == options.d_model(),
                "x must have shape [batch, length, d_model = {}], got {}", options.d_model(),
                frontend::shape_of(x));
  const int64_t mixers = options.mixers_per_layer();
  const auto all = static_cast<size_t>(mixers * options.layers());
  require_value(!call.state || call.state->mamba.size() == all,
                "state must hold one state for each of the {} mixers, got {}", all,
                call.state ? call.state->mamba.size() : 0);
  torch::Tensor hidden = x;
  DecoderState after;
  for (const auto& layer : *layers) {
    DecoderCall part{.cu_seqlens = call.cu_seqlens};
    if (call.state) {
      const auto first = call.state->mamba.begin() + static_cast<std::ptrdiff_t>(after.mamba.size());
      part.state = DecoderState{{first, first + mixers}};
    }
    auto [y, states] = layer->as<MambaLayerImpl>()->forward(hidden, routing, part);
    hidden = y;
    after.mamba.insert(after.mamba.end(), states.mamba.begin(), states.mamba.end());
  }
  return {final_norm->forward(hidden), after};
}

}  // namespace mixture_of_mamba::models
