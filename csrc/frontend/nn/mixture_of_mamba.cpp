// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/nn/mixture_of_mamba.h"

#include <cmath>
#include <limits>

#include "mixing.h"
#include "names.h"
#include "ssm_dtype.h"
#include "text.h"

namespace mixture_of_mamba::nn {

namespace {

using frontend::require_value;

void check_sizes(const MixtureOfMambaOptions& options) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"d_model", options.d_model()}, {"num_modalities", options.num_modalities()},
      {"d_state", options.d_state()}, {"d_conv", options.d_conv()},
      {"dt_rank", options.rank()},
  };
  for (const auto& [name, size] : sizes)
    require_value(size >= 1, "{} must be at least 1, got {}", name, size);
  require_value(options.expand() * static_cast<double>(options.d_model()) >= 1,
                "expand must make d_inner = expand * d_model at least 1, got {}",
                frontend::text_of(options.expand()));
}

void check(MixtureOfMambaOptions& options) {
  frontend::Names shareable;
  for (const std::string& name : options.decouple()) {
    if (frontend::contains(frontend::kProjections, name)) shareable.push_back(name);
  }
  frontend::check_names("decouple", options.decouple(), frontend::kDecoupled);
  frontend::check_names("shared_expert", options.shared_expert(), shareable);
  check_sizes(options);
  require_value(0 < options.dt_min() && options.dt_min() <= options.dt_max(),
                "dt_min and dt_max must have 0 < dt_min <= dt_max, got {} and {}",
                frontend::text_of(options.dt_min()), frontend::text_of(options.dt_max()));
  require_value(options.dt_init() == "random" || options.dt_init() == "constant",
                "dt_init must be \"random\" or \"constant\", got '{}'", options.dt_init());
  require_value(options.memory() == "default" || options.memory() == "lean",
                "memory must be \"default\" or \"lean\", got '{}'", options.memory());
  require_value(!options.dtype() || c10::isFloatingType(*options.dtype()),
                "dtype must be a floating type, got {}",
                options.dtype() ? frontend::name_of(*options.dtype()) : "");
  if (const auto limit = options.dt_limit()) {
    const auto [low, high] = *limit;
    require_value(0 <= low && low < high, "dt_limit must have 0 <= low < high, got ({}, {})",
                  frontend::text_of(low), frontend::text_of(high));
    if (low == 0 && high == std::numeric_limits<double>::infinity()) options.dt_limit(std::nullopt);
  }
}

}  // namespace

MixtureOfMambaOptions::MixtureOfMambaOptions(int64_t d_model, int64_t num_modalities)
    : d_model_(d_model), num_modalities_(num_modalities) {}

int64_t MixtureOfMambaOptions::d_inner() const { return static_cast<int64_t>(expand() * d_model()); }

int64_t MixtureOfMambaOptions::rank() const { return dt_rank().value_or((d_model() + 15) / 16); }

std::vector<torch::nn::Linear> Projection::linears() const {
  if (shared) return {shared};
  return decoupled->linears;
}

std::vector<torch::Tensor> Projection::weights() const {
  if (shared) return {shared->weight};
  return decoupled->weights();
}

std::vector<torch::Tensor> Projection::biases() const {
  if (!shared) return decoupled->biases();
  if (!shared->bias.defined()) return {};
  return {shared->bias};
}

MixtureOfMambaImpl::MixtureOfMambaImpl(int64_t d_model, int64_t num_modalities)
    : MixtureOfMambaImpl(MixtureOfMambaOptions(d_model, num_modalities)) {}

MixtureOfMambaImpl::MixtureOfMambaImpl(const MixtureOfMambaOptions& options_) : options(options_) {
  check(options);
  MixtureOfMambaImpl::reset();
}

Projection MixtureOfMambaImpl::make_projection(const std::string& name, int64_t in_features,
                                               int64_t out_features, bool bias) {
  Projection projection;
  if (frontend::contains(options.decouple(), name)) {
    const auto each = ModalityLinearOptions(in_features, out_features, options.num_modalities())
                          .bias(bias)
                          .shared_expert(frontend::contains(options.shared_expert(), name));
    projection.decoupled = register_module(name, ModalityLinear(each));
  } else {
    const auto all = torch::nn::LinearOptions(in_features, out_features).bias(bias);
    projection.shared = register_module(name, torch::nn::Linear(all));
  }
  return projection;
}

void MixtureOfMambaImpl::reset() {
  const int64_t d_model = options.d_model(), inner = options.d_inner(), states = options.d_state();
  const int64_t rank = options.rank(), width = options.d_conv();
  in_proj = make_projection("in_proj", d_model, 2 * inner, options.bias());
  const auto conv = torch::nn::Conv1dOptions(inner, inner, width).groups(inner).padding(width - 1);
  conv1d =
      register_module("conv1d", torch::nn::Conv1d(torch::nn::Conv1dOptions(conv).bias(options.conv_bias())));
  x_proj = make_projection("x_proj", inner, rank + 2 * states, false);
  dt_proj = make_projection("dt_proj", rank, inner, true);
  const auto recurrent = [this](const std::string& name, std::vector<int64_t> shape) {
    if (frontend::contains(options.decouple(), name)) shape.insert(shape.begin(), options.num_modalities());
    return register_parameter(name, torch::empty(shape, torch::kFloat32));
  };
  A_log = recurrent("A_log", {inner, states});
  D = recurrent("D", {inner});
  out_proj = make_projection("out_proj", inner, d_model, options.bias());
  dt_layernorm = b_layernorm = c_layernorm = nullptr;
  if (options.bcdt_norm()) {
    dt_layernorm = register_module("dt_layernorm", RMSNorm(RMSNormOptions(rank).eps(1e-6)));
    b_layernorm = register_module("b_layernorm", RMSNorm(RMSNormOptions(states).eps(1e-6)));
    c_layernorm = register_module("c_layernorm", RMSNorm(RMSNormOptions(states).eps(1e-6)));
  }
  reset_parameters();
  if (options.dtype()) {
    for (const auto& child : children()) child->to(*options.dtype());
  }
  if (options.device()) to(*options.device());
}

void MixtureOfMambaImpl::reset_parameters() {
  torch::NoGradGuard no_grad;
  // In the order of Python's modules(), so that a seed gives the same values.
  for (const Projection* projection : {&in_proj, &x_proj, &dt_proj, &out_proj}) {
    if (projection->shared) {
      projection->shared.ptr()->reset_parameters();
    } else {
      projection->decoupled.ptr()->reset_parameters();
    }
    if (projection == &in_proj) conv1d->reset_parameters();
  }
  for (RMSNorm* norm : {&dt_layernorm, &b_layernorm, &c_layernorm}) {
    if (*norm) (*norm)->reset_parameters();
  }
  A_log.copy_(torch::ones_like(A_log, torch::kFloat32).cumsum(-1).log());
  D.fill_(1.0);
  const double bound = std::pow(static_cast<double>(options.rank()), -0.5) * options.dt_scale();
  const double low = std::log(options.dt_min()), high = std::log(options.dt_max());
  for (torch::nn::Linear linear : dt_proj.linears()) {
    if (options.dt_init() == "constant") {
      linear->weight.fill_(bound);
    } else {
      linear->weight.uniform_(-bound, bound);
    }
    torch::Tensor dt = torch::rand_like(linear->bias, torch::kFloat32);
    dt = (low + dt * (high - low)).exp().clamp_min(options.dt_init_floor());
    linear->bias.copy_(dt + torch::log(-torch::expm1(-dt)));  // the inverse of softplus
  }
}

void MixtureOfMambaImpl::pretty_print(std::ostream& stream) const {
  std::string more;
  if (const auto bounds = options.dt_limit())
    more = fmt::format(", dt_limit=({}, {})", bounds->first, bounds->second);
  if (!options.shared_expert().empty())
    more += fmt::format(", shared_expert=[{}]", fmt::join(options.shared_expert(), ", "));
  stream << fmt::format(
      "mixture_of_mamba::nn::MixtureOfMamba(d_model={}, num_modalities={}, decouple=[{}]{})",
      options.d_model(), options.num_modalities(), fmt::join(options.decouple(), ", "), more);
}

std::tuple<torch::Tensor, MambaState> MixtureOfMambaImpl::forward_with_state(const torch::Tensor& x,
                                                                             const Modality& modality,
                                                                             const MixOptions& call) {
  const auto routing = frontend::routing_of(*this, x, modality);
  const bool permute = routing && !call.sorted;
  auto [y, state] =
      frontend::mix(*this, permute ? routing->sort(x) : x, routing, call.cu_seqlens, call.state);
  return {permute ? routing->unsort(y) : y, state};
}

torch::Tensor MixtureOfMambaImpl::forward(const torch::Tensor& x, const Modality& modality,
                                          const MixOptions& call) {
  return std::get<0>(forward_with_state(x, modality, call));
}

torch::Tensor MixtureOfMambaImpl::step(const torch::Tensor& x, MambaState& state, const Modality& modality) {
  torch::NoGradGuard no_grad;
  const auto routing = frontend::routing_of(*this, x, modality);
  const torch::Tensor y = frontend::step(*this, routing ? routing->sort(x) : x, routing, state);
  return routing ? routing->unsort(y) : y;
}

MambaState MixtureOfMambaImpl::allocate_state(int64_t batch, std::optional<torch::Dtype> dtype,
                                              std::optional<torch::Dtype> ssm_dtype) const {
  require_value(batch >= 0, "batch must be an integer of at least 0, got {}", batch);
  require_value(!dtype || c10::isFloatingType(*dtype), "dtype must be a floating type, got {}",
                dtype ? frontend::name_of(*dtype) : "");
  const auto activations =
      conv1d->weight.options().requires_grad(false).dtype(dtype.value_or(conv1d->weight.scalar_type()));
  const auto sums = activations.dtype(
      frontend::checked_ssm_dtype("ssm_dtype", ssm_dtype, c10::typeMetaToScalarType(activations.dtype())));
  return {torch::zeros({batch, options.d_conv() - 1, options.d_inner()}, activations),
          torch::zeros({batch, options.d_inner(), options.d_state()}, sums)};
}

std::vector<torch::Tensor> MixtureOfMambaImpl::parameters_without_weight_decay() const {
  std::vector<torch::Tensor> tensors{A_log, D};
  for (const torch::Tensor& bias : dt_proj.biases()) tensors.push_back(bias);
  return tensors;
}

}  // namespace mixture_of_mamba::nn
