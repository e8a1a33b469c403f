// SPDX-License-Identifier: Apache-2.0
#include "support.h"

namespace mixture_of_mamba::testing {

// Tensors are tiny here: threads would only wait for each other.
[[maybe_unused]] static const bool kOneThread = (torch::set_num_threads(1), true);

void require_close(const std::string& name, const Tensor& got, const Tensor& expected, double tolerance) {
  INFO(name);
  REQUIRE(got.sizes().vec() == expected.sizes().vec());
  REQUIRE(got.scalar_type() == expected.scalar_type());
  const double worst = got.numel() == 0 ? 0 : (got - expected).abs().max().item<double>();
  const double scale = got.numel() == 0 ? 1 : std::max(1.0, expected.abs().max().item<double>());
  INFO("largest difference " << worst << " of values up to " << scale);
  REQUIRE(worst <= tolerance * scale);
}

std::string error_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

nn::MixtureOfMamba make_layer(const nn::MixtureOfMambaOptions& options) {
  nn::MixtureOfMamba layer(options);
  layer->to(torch::kFloat64);
  torch::NoGradGuard no_grad;
  layer->A_log.add_(torch::rand_like(layer->A_log) * 0.3);
  layer->D.add_(torch::randn_like(layer->D) * 0.3);
  for (const nn::Projection* one : {&layer->in_proj, &layer->x_proj, &layer->dt_proj, &layer->out_proj}) {
    if (!one->decoupled || !one->decoupled->shared) continue;
    const Tensor& weight = one->decoupled->shared->weight;  // zero before training
    weight.add_(torch::randn_like(weight) * 0.3);
  }
  for (nn::RMSNorm* norm : {&layer->dt_layernorm, &layer->b_layernorm, &layer->c_layernorm}) {
    if (*norm) (*norm)->weight.add_(torch::randn_like((*norm)->weight) * 0.3);
  }
  return layer;
}

static Tensor weighted_sum(const Tensors& outputs) {
  Tensor sum = torch::zeros({}, torch::kFloat64);
  double frequency = 1.0;
  for (const Tensor& output : outputs) {
    const Tensor weights =
        torch::cos(frequency * torch::arange(output.numel(), torch::kFloat64)).view_as(output);
    sum = sum + (output * weights).sum();
    frequency += 0.7;
  }
  return sum;
}

Tensors gradients(const Tensors& outputs, const Tensors& inputs) {
  Tensors grads = torch::autograd::grad({weighted_sum(outputs)}, inputs, {}, std::nullopt, false, true);
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined()) grads[i] = torch::zeros_like(inputs[i]);
  }
  return grads;
}

void require_gradients(const std::function<Tensors()>& run,
                       const std::vector<std::pair<std::string, Tensor>>& inputs) {
  Tensors tensors;
  for (const auto& [name, tensor] : inputs) tensors.push_back(tensor);
  const Tensors grads = gradients(run(), tensors);
  torch::NoGradGuard no_grad;
  constexpr double kStep = 1e-6;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor expected = torch::zeros_like(tensors[i]);
    for (int64_t e = 0; e < tensors[i].numel(); ++e) {
      double* element = tensors[i].data_ptr<double>() + e;
      const double value = *element;
      *element = value + kStep;
      const double above = weighted_sum(run()).item<double>();
      *element = value - kStep;
      const double below = weighted_sum(run()).item<double>();
      *element = value;
      expected.data_ptr<double>()[e] = (above - below) / (2 * kStep);
    }
    require_close("gradient of " + inputs[i].first, grads[i], expected, 1e-7);
  }
}

static Tensor project(const nn::Projection& projection, const Tensor& x, int64_t modality) {
  const auto linears = projection.linears();
  torch::nn::Linear linear = linears[projection.shared ? 0 : static_cast<size_t>(modality)];
  const Tensor y = linear->forward(x);
  if (projection.shared || !projection.decoupled->shared) return y;
  return y + torch::linear(x, projection.decoupled->shared->weight);
}

// A modality's own, or everybody's.
static Tensor of_modality(const Tensor& parameter, int64_t own_dim, int64_t modality) {
  return parameter.dim() == own_dim ? parameter[modality] : parameter;
}

static Tensor normalised(const nn::RMSNorm& norm, const Tensor& x) {
  return norm ? x / (x.square().mean(-1, true) + 1e-6).sqrt() * norm->weight : x;
}

Tensor reference_sequence(nn::MixtureOfMambaImpl& layer, const Tensor& x, const Tensor& ids,
                          ReferenceState& state) {
  const auto& options = layer.options;
  const int64_t width = options.d_conv(), states = options.d_state();
  if (!state.h.defined()) {
    state.h = torch::zeros({options.d_inner(), states}, x.options());
    state.inputs.assign(static_cast<size_t>(width - 1), torch::zeros({options.d_inner()}, x.options()));
  }
  Tensors out;
  for (int64_t t = 0; t < x.size(0); ++t) {
    const int64_t modality = ids[t].item<int64_t>();
    if (modality < 0) {
      out.push_back(torch::zeros({x.size(1)}, x.options()));
      continue;
    }
    const auto xz = project(layer.in_proj, x[t], modality).chunk(2);
    state.inputs.push_back(xz[0]);
    Tensor u = torch::zeros_like(xz[0]);
    for (int64_t k = 0; k < width; ++k) {
      u = u + layer.conv1d->weight.select(1, 0).select(1, k) * state.inputs[static_cast<size_t>(k)];
    }
    state.inputs.erase(state.inputs.begin());
    if (layer.conv1d->bias.defined()) u = u + layer.conv1d->bias;
    u = torch::silu(u);
    const auto parts = project(layer.x_proj, u, modality).split_with_sizes({options.rank(), states, states});
    const Tensor dt = project(layer.dt_proj, normalised(layer.dt_layernorm, parts[0]), modality);
    const Tensor B = normalised(layer.b_layernorm, parts[1]), C = normalised(layer.c_layernorm, parts[2]);
    Tensor delta = torch::softplus(dt);
    if (const auto limit = options.dt_limit()) delta = delta.clamp(limit->first, limit->second);
    const Tensor A = -torch::exp(of_modality(layer.A_log, 3, modality));
    state.h = torch::exp(delta.unsqueeze(1) * A) * state.h + (delta * u).unsqueeze(1) * B;
    const Tensor y = ((state.h * C).sum(1) + of_modality(layer.D, 2, modality) * u) * torch::silu(xz[1]);
    out.push_back(project(layer.out_proj, y, modality));
  }
  return torch::stack(out);
}

Tensor reference_layer(nn::MixtureOfMambaImpl& layer, const Tensor& x, const Tensor& ids) {
  Tensors rows;
  for (int64_t b = 0; b < x.size(0); ++b) {
    ReferenceState state;
    rows.push_back(reference_sequence(layer, x[b], ids[b], state));
  }
  return torch::stack(rows);
}

}  // namespace mixture_of_mamba::testing
