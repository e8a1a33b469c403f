// SPDX-License-Identifier: Apache-2.0
#include "mixing.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "linear_of_all.h"
#include "mixture_of_mamba/ops.h"
#include "per_row.h"
#include "scan_of_pairs.h"

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

Tensor first(const std::vector<Tensor>& tensors) { return tensors.empty() ? Tensor() : tensors.front(); }

// Without a routing nothing tells tokens apart: there is one modality, or one projection for all.
Tensor project(const nn::Projection& projection, const Tensor& x, const OptionalRouting& routing) {
  if (projection.shared || !routing) {
    return linear_of_all(x, projection.weights()[0], first(projection.biases()), routing);
  }
  return projection.decoupled.ptr()->forward(x, *routing);
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
  return with_bias(dt, dt_bias, routing).clamp(inverse_softplus(limit.first), inverse_softplus(limit.second));
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
  ScanInputs inputs{Tensor(), std::nullopt, normalised(layer.b_layernorm, parts[1]),
                    normalised(layer.c_layernorm, parts[2])};
  if (layer.dt_proj.shared || !routing) {
    inputs.dt = linear_of_all(low, layer.dt_proj.weights()[0], Tensor(), routing);
    inputs.dt_bias = layer.dt_proj.biases()[0];
  } else {
    inputs.dt = grouped_linear(low, layer.dt_proj.weights(), {}, routing->offsets, routing->host_offsets);
    inputs.dt_bias = torch::stack(layer.dt_proj.biases());
  }
  if (layer.options.dt_limit()) {
    inputs.dt = limited_dt(inputs.dt, inputs.dt_bias, *layer.options.dt_limit(), routing);
    inputs.dt_bias = std::nullopt;
  }
  return inputs;
}

PairScan pairs_of(const Tensor& u, const Tensor& z, const Tensor& A, const ScanInputs& in,
                  const OptionalRouting& routing) {
  return {u, in.dt, A, in.B, in.C, z, in.dt_bias, *routing};
}

// What the scan adds by itself; nothing when every modality has its own D.
OptionalTensor fused_skip(const MixtureOfMambaImpl& layer) {
  return layer.D.dim() == 1 ? OptionalTensor(layer.D) : std::nullopt;
}

// The scan's output with D * u * silu(z), which the scan leaves out where D or A is per modality. The rest is
// gated already. This part is a few elementwise operators in float32 at least.
Tensor with_skip(const MixtureOfMambaImpl& layer, const Tensor& y, const Tensor& u, const Tensor& z,
                 const OptionalRouting& routing) {
  if (layer.A_log.dim() == 2 && layer.D.dim() == 1) return y;
  Tensor D = layer.D.to(torch::promote_types(layer.D.scalar_type(), torch::kFloat32));
  if (D.dim() > 1) D = of_rows(D, *routing).view(u.sizes());
  return (y + D * u * torch::silu(z.to(D.scalar_type()))).to(u.scalar_type());
}

// Whether nothing is between the projections, A and D are one for all, and, where boundaries are on a GPU
// alone, all projections are decoupled.
bool is_one_operator(const MixtureOfMambaImpl& layer, const Tensor& x, const OptionalRouting& routing) {
  if (layer.A_log.dim() > 2 || layer.D.dim() > 1) return false;
  if (layer.options.dt_limit() || layer.options.bcdt_norm()) return false;
  if (!routing || routing->host_offsets || x.is_cpu()) return true;
  const auto projections = {&layer.in_proj, &layer.x_proj, &layer.dt_proj, &layer.out_proj};
  const size_t modalities = routing->num_modalities();
  return std::all_of(projections.begin(), projections.end(),
                     [&](const auto* projection) { return projection->linears().size() == modalities; });
}

MambaBlockParameters block_parameters(const MixtureOfMambaImpl& layer) {
  return {.in_weight = layer.in_proj.weights(),
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
}

OptionalTensor host_offsets_of(const OptionalRouting& routing) {
  return routing ? routing->host_offsets : std::nullopt;
}

Mixed mix_in_one_operator(const MixtureOfMambaImpl& layer, const Tensor& x, const OptionalRouting& routing,
                          const OptionalTensor& cu_seqlens, const OptionalState& state) {
  MambaBlockOptions options{.rows = rows_of(routing),
                            .offsets = offsets_of(routing),
                            .host_offsets = host_offsets_of(routing),
                            .cu_seqlens = cu_seqlens,
                            .lean = layer.options.memory() == "lean"};
  if (state) {
    options.conv_state = state->conv;
    options.ssm_state = state->ssm;
  }
  auto [y, conv, ssm] = mamba_block(x, block_parameters(layer), options);
  return {y, MambaState{conv, ssm}};
}

// From the convolution's output to out_proj's input, and the last state.
std::tuple<Tensor, Tensor> scan(MixtureOfMambaImpl& layer, const Tensor& u, const Tensor& z,
                                const OptionalRouting& routing, const OptionalTensor& cu_seqlens,
                                const OptionalTensor& initial_state) {
  const ScanInputs in = scan_inputs(layer, u, routing);
  const Tensor A = decay_rates(layer);
  Tensor y, last;
  if (A.dim() > 2) {
    std::tie(y, last) = scan_of_pairs(pairs_of(u, z, A, in, routing), cu_seqlens, initial_state);
  } else {
    std::tie(y, last) = selective_scan(u, in.dt, A, in.B, in.C,
                                       {.D = fused_skip(layer),
                                        .z = z,
                                        .dt_bias = in.dt_bias,
                                        .rows = rows_of(routing),
                                        .offsets = offsets_of(routing),
                                        .cu_seqlens = cu_seqlens,
                                        .initial_state = initial_state});
  }
  return {with_skip(layer, y, u, z, routing), last};
}

// The same for one or a few tokens, updating the state in place.
Tensor scan_step(MixtureOfMambaImpl& layer, const Tensor& u, const Tensor& z, const OptionalRouting& routing,
                 Tensor& state) {
  const ScanInputs in = scan_inputs(layer, u, routing);
  const Tensor A = decay_rates(layer);
  const Tensor y = A.dim() > 2 ? scan_of_pairs_step(pairs_of(u, z, A, in, routing), state)
                               : selective_scan_step(u, state, in.dt, A, in.B, in.C,
                                                     {.D = fused_skip(layer),
                                                      .z = z,
                                                      .dt_bias = in.dt_bias,
                                                      .rows = rows_of(routing),
                                                      .offsets = offsets_of(routing)});
  return with_skip(layer, y, u, z, routing);
}

}  // namespace

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
  const OptionalTensor start = state ? optional(state->ssm) : std::nullopt;
  auto [y, ssm] = scan(layer, u, xz[1], routing, cu_seqlens, start);
  return {project(layer.out_proj, y, routing), MambaState{conv, ssm}};
}

Tensor step(MixtureOfMambaImpl& layer, const Tensor& x, const OptionalRouting& routing, MambaState& state) {
  const OptionalTensor rows = rows_of(routing), offsets = offsets_of(routing);
  if (is_one_operator(layer, x, routing) && !at::autocast::is_autocast_enabled(x.device().type())) {
    return mamba_block_step(x, state.conv, state.ssm, block_parameters(layer),
                            {.rows = rows, .offsets = offsets, .host_offsets = host_offsets_of(routing)});
  }
  const auto xz = project(layer.in_proj, x, routing).chunk(2, -1);
  const Tensor u = causal_conv1d_step(xz[0], state.conv, conv_weight(layer), optional(layer.conv1d->bias),
                                      {.rows = rows, .offsets = offsets});
  return project(layer.out_proj, scan_step(layer, u, xz[1], routing, state.ssm), routing);
}

}  // namespace mixture_of_mamba::frontend
