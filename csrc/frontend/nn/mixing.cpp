// SPDX-License-Identifier: Apache-2.0
#include "mixing.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "intervals.h"
#include "mixture_of_mamba/ops.h"
#include "text.h"

namespace mixture_of_mamba::frontend {

namespace {

using nn::MambaState;
using nn::MixtureOfMambaImpl;
using torch::Tensor;

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

OptionalTensor rows_of(const OptionalRouting& routing) {
  return routing ? optional(routing->rows) : std::nullopt;
}

OptionalTensor offsets_of(const OptionalRouting& routing) {
  return routing ? optional(routing->offsets) : std::nullopt;
}

Tensor conv_weight(const MixtureOfMambaImpl& layer) { return layer.conv1d->weight.squeeze(1); }

Tensor decay_rates(const MixtureOfMambaImpl& layer) {
  const Tensor& A_log = layer.A_log;
  return -torch::exp(A_log.to(torch::promote_types(A_log.scalar_type(), torch::kFloat32)));
}

// A shared projection: one GEMM over all rows, which must leave padding rows out when there are any.
Tensor project_shared(const torch::nn::Linear& linear, const Tensor& x, const OptionalRouting& routing,
                      bool use_bias) {
  const Tensor bias = use_bias ? linear->bias : Tensor();
  if (!routing || !routing->has_padding) return torch::linear(x, linear->weight, optional(bias));
  const Routing merged = routing->merged();
  std::vector<Tensor> biases;
  if (bias.defined()) biases.push_back(bias);
  return grouped_linear(x, {linear->weight}, biases, merged.offsets, merged.host_offsets);
}

Tensor project(const nn::Projection& projection, const Tensor& x, const OptionalRouting& routing,
               bool use_bias = true) {
  if (projection.shared) return project_shared(projection.shared, x, routing, use_bias);
  const std::vector<Tensor> biases = use_bias ? projection.biases() : std::vector<Tensor>{};
  return grouped_linear(x, projection.weights(), biases, routing->offsets, routing->host_offsets);
}

// Computed in the weight's dtype where that is wider, as under autocast; rounded, so as not to widen the
// scan.
Tensor normalised(const nn::RMSNorm& norm, const Tensor& x) {
  if (!norm) return x;
  const auto wide = torch::promote_types(x.scalar_type(), norm->weight.scalar_type());
  return norm.ptr()->forward(x.to(wide)).to(x.scalar_type());
}

double inverse_softplus(double delta) {
  return delta == 0 ? -std::numeric_limits<double>::infinity() : delta + std::log(-std::expm1(-delta));
}

// dt with its bias, clamped so that softplus of it lies within the limits: softplus grows, so the clamp may
// come before it. In float32 at least: in 16 bits both the bias and the bounds, far from 0, would lose about
// a percent.
Tensor limited_dt(const Tensor& dt, const OptionalTensor& dt_bias, const std::pair<double, double>& limit,
                  const OptionalRouting& routing) {
  Tensor wide = dt.to(torch::promote_types(dt.scalar_type(), torch::kFloat32));
  if (dt_bias) {
    Tensor bias = dt_bias->to(wide.scalar_type());
    if (bias.dim() == 2) {
      // Each row's bias. Padding takes the last modality's; the scan passes over it and sends back zeros.
      const Tensor rows = torch::arange(routing->num_tokens(), wide.options().dtype(torch::kInt32));
      const Tensor modality = interval_of(rows, routing->offsets);
      bias = torch::embedding(bias, modality).view(wide.sizes());
    }
    wide = wide + bias;
  }
  return wide.clamp(inverse_softplus(limit.first), inverse_softplus(limit.second));
}

struct ScanInputs {
  Tensor dt;
  OptionalTensor dt_bias;  // left for the scan to add in float32 where possible
  Tensor B, C;
};

ScanInputs scan_inputs(MixtureOfMambaImpl& layer, const Tensor& u, const OptionalRouting& routing) {
  const int64_t rank = layer.options.rank(), states = layer.options.d_state();
  const auto parts = project(layer.x_proj, u, routing).split_with_sizes({rank, states, states}, -1);
  const Tensor low = normalised(layer.dt_layernorm, parts[0]);
  ScanInputs inputs{project(layer.dt_proj, low, routing, /*use_bias=*/false), std::nullopt,
                    normalised(layer.b_layernorm, parts[1]), normalised(layer.c_layernorm, parts[2])};
  const std::vector<Tensor> biases = layer.dt_proj.biases();
  if (layer.dt_proj.shared) {
    inputs.dt_bias = biases[0];
  } else {
    inputs.dt_bias = torch::stack(biases);
  }
  if (layer.options.dt_limit()) {
    inputs.dt = limited_dt(inputs.dt, inputs.dt_bias, *layer.options.dt_limit(), routing);
    inputs.dt_bias = std::nullopt;
  }
  return inputs;
}

// Whether nothing is between the projections, and boundaries are on the host.
bool is_one_operator(const MixtureOfMambaImpl& layer, const Tensor& x, const OptionalRouting& routing) {
  if (routing && !routing->host_offsets && !x.is_cpu()) return false;
  return !layer.options.dt_limit() && !layer.options.bcdt_norm();
}

Mixed mix_in_one_operator(const MixtureOfMambaImpl& layer, const Tensor& x, const OptionalRouting& routing,
                          const OptionalTensor& cu_seqlens, const OptionalState& state) {
  const MambaBlockParameters parameters{.in_weight = layer.in_proj.weights(),
                                        .in_bias = layer.in_proj.biases(),
                                        .conv_weight = conv_weight(layer),
                                        .conv_bias = optional(layer.conv1d->bias),
                                        .x_weight = layer.x_proj.weights(),
                                        .dt_weight = layer.dt_proj.weights(),
                                        .dt_bias = layer.dt_proj.biases(),
                                        .A_log = layer.A_log,
                                        .D = layer.D,
                                        .out_weight = layer.out_proj.weights(),
                                        .out_bias = layer.out_proj.biases()};
  MambaBlockOptions options{.rows = rows_of(routing),
                            .offsets = offsets_of(routing),
                            .host_offsets = routing ? routing->host_offsets : std::nullopt,
                            .cu_seqlens = cu_seqlens,
                            .lean = layer.options.memory() == "lean"};
  if (state) {
    options.conv_state = state->conv;
    options.ssm_state = state->ssm;
  }
  auto [y, conv, ssm] = mamba_block(x, parameters, options);
  return {y, MambaState{conv, ssm}};
}

}  // namespace

OptionalRouting routing_of(const MixtureOfMambaImpl& layer, const Tensor& x, const nn::Modality& modality) {
  const int64_t modalities = layer.options.num_modalities(), d_model = layer.options.d_model();
  require_value(x.dim() == 3 && x.size(2) == d_model,
                "x must have shape [batch, length, d_model = {}], got {}", d_model, shape_of(x));
  if (const Routing* given = std::get_if<Routing>(&modality)) {
    const Routing routing = modalities == 1 && given->num_modalities() > 1 ? given->merged() : *given;
    require_value(routing.num_modalities() == modalities,
                  "modality must be a Routing of {} modalities, got {}", modalities,
                  routing.num_modalities());
    require_value(routing.batch == x.size(0) && routing.length == x.size(1),
                  "modality must have the batch and length of x, [{}, {}], got [{}, {}]", x.size(0),
                  x.size(1), routing.batch, routing.length);
    return routing;
  }
  if (const Tensor* ids = std::get_if<Tensor>(&modality)) {
    const Tensor known = modalities == 1 ? ids->clamp_max(0) : *ids;
    return routing_of(layer, x, Routing::from_ids(known, modalities, {.device = x.device()}));
  }
  require_value(
      modalities == 1 || !std::holds_alternative<std::monostate>(modality),
      "modality must be ids [batch, length] or a Routing (or one int for all tokens, or modality_masks in "
      "its place), since the layer has {} modalities, got None",
      modalities);
  const int64_t* one = std::get_if<int64_t>(&modality);
  const int64_t id = one == nullptr ? 0 : *one;
  require_value(id >= 0 && (modalities == 1 || id < modalities),
                "modality must lie in 0 .. num_modalities - 1 = {} when it is an int, got {}", modalities - 1,
                id);
  if (layer.options.decouple().empty()) return std::nullopt;
  return routing_of(layer, x, torch::full({x.size(0), x.size(1)}, modalities == 1 ? 0 : id, torch::kInt64));
}

Mixed mix(MixtureOfMambaImpl& layer, const Tensor& x, const OptionalRouting& routing,
          const OptionalTensor& cu_seqlens, const OptionalState& state) {
  if (is_one_operator(layer, x, routing)) return mix_in_one_operator(layer, x, routing, cu_seqlens, state);
  return mix_step_by_step(layer, x, routing, cu_seqlens, state);
}

Mixed mix_step_by_step(MixtureOfMambaImpl& layer, const Tensor& x, const OptionalRouting& routing,
                       const OptionalTensor& cu_seqlens, const OptionalState& state) {
  const auto xz = project(layer.in_proj, x, routing).chunk(2, -1);
  auto [u, conv] = causal_conv1d(xz[0], conv_weight(layer), optional(layer.conv1d->bias),
                                 {.rows = rows_of(routing),
                                  .offsets = offsets_of(routing),
                                  .cu_seqlens = cu_seqlens,
                                  .initial_state = state ? optional(state->conv) : std::nullopt});
  const ScanInputs in = scan_inputs(layer, u, routing);
  auto [y, ssm] = selective_scan(u, in.dt, decay_rates(layer), in.B, in.C,
                                 {.D = layer.D,
                                  .z = xz[1],
                                  .dt_bias = in.dt_bias,
                                  .rows = rows_of(routing),
                                  .offsets = offsets_of(routing),
                                  .cu_seqlens = cu_seqlens,
                                  .initial_state = state ? optional(state->ssm) : std::nullopt});
  return {project(layer.out_proj, y, routing), MambaState{conv, ssm}};
}

Tensor step(MixtureOfMambaImpl& layer, const Tensor& x, const OptionalRouting& routing, MambaState& state) {
  const OptionalTensor rows = rows_of(routing), offsets = offsets_of(routing);
  const auto xz = project(layer.in_proj, x, routing).chunk(2, -1);
  const Tensor u = causal_conv1d_step(xz[0], state.conv, conv_weight(layer), optional(layer.conv1d->bias),
                                      {.rows = rows, .offsets = offsets});
  const ScanInputs in = scan_inputs(layer, u, routing);
  const Tensor y = selective_scan_step(
      u, state.ssm, in.dt, decay_rates(layer), in.B, in.C,
      {.D = layer.D, .z = xz[1], .dt_bias = in.dt_bias, .rows = rows, .offsets = offsets});
  return project(layer.out_proj, y, routing);
}

}  // namespace mixture_of_mamba::frontend
