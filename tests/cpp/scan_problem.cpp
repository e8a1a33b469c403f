// SPDX-License-Identifier: Apache-2.0
#include "scan_problem.h"

#include <cmath>
#include <sstream>

namespace mixture_of_mamba::testing {

ScanProblem ScanProblem::random(Random& random, bool with_float64, int longest) {
  ScanProblem p;
  p.type = random.type(with_float64);
  p.tokens = Tokens::random(random, longest);
  p.channels = random.chance(3) ? 8 * random.between(1, 10) : random.below(41);
  const int64_t unusual[] = {0, 1, 3, 4, 7, 8, 9, 17, 33};
  p.states = random.chance(2) ? 16 : unusual[random.below(9)];
  p.bias_modalities = random.chance(4) ? 0 : random.chance(3) ? 1 : p.tokens.modalities;
  p.softplus = !random.chance(4);
  p.reverse = random.chance(3);
  p.skip = !random.chance(3);
  p.gate = !random.chance(3);
  p.initial = random.chance(2);
  p.final = !random.chance(4);
  p.grad_final = random.chance(2);
  p.in_place = p.initial && p.final && random.chance(2);
  p.absent_outputs = random.chance(3) ? random.bits() % 64 : 0;
  p.gap = random.chance(2) ? 0 : random.chance(2) ? 8 * random.below(4) : random.below(9);
  p.offset = random.chance(3) ? random.below(9) : 0;
  const ScalarType acc = acc_of(p.type);
  const int64_t inner = p.tokens.count() * p.channels, pairs = p.tokens.count() * p.states;
  // Without softplus delta is what it is, and has to be positive for a decay.
  const auto positive = [](Reals values) {
    for (Real& value : values) value = std::fabs(value);
    return values;
  };
  p.u = random.normal(inner, 0, 1, p.type);
  p.dt = random.normal(inner, p.softplus ? -1 : 0, p.softplus ? 1 : 0.3L, p.type);
  p.dt_bias = random.normal(p.bias_modalities * p.channels, p.softplus ? -1 : 0, 0.2L, acc);
  if (!p.softplus) {
    p.dt = positive(p.dt);
    p.dt_bias = positive(p.dt_bias);
  }
  p.A = random.normal(p.channels * p.states, 0, 1, acc);
  for (size_t i = 0; i < p.A.size(); ++i) {
    p.A[i] = -std::fabs(p.A[i]) * static_cast<int>(1 + i % 16);  // exact: 4 bits would not round, floats do
    p.A[i] = static_cast<float>(p.A[i]);
  }
  p.B = random.normal(pairs, 0, 1, p.type);
  p.C = random.normal(pairs, 0, 1, p.type);
  p.D = random.normal(p.channels, 1, 0.3L, acc);
  p.z = random.normal(inner, 0, 1, p.type);
  p.initial_values = random.normal(p.state_size(), 0, 1, acc);
  p.grad_out = random.normal(inner, 0, 1, p.type);
  p.grad_final_values = random.normal(p.state_size(), 0, 1, acc);
  return p;
}

std::string ScanProblem::describe() const {
  std::ostringstream text;
  text << name_of(type) << ", " << channels << " channels, " << states << " states, dt_bias of "
       << bias_modalities << (softplus ? ", softplus" : "") << (reverse ? ", reverse" : "")
       << (skip ? ", D" : "") << (gate ? ", z" : "") << (initial ? ", initial state" : "")
       << (final ? ", final state" : "") << (in_place ? " in place" : "")
       << (grad_final ? ", its gradient" : "") << ", absent outputs " << absent_outputs << ", gap " << gap
       << ", offset " << offset << ", " << tokens.describe();
  return text.str();
}

struct ScanProblem::Gradients {
  Reals u, dt, B, C, z, A, D, dt_bias, initial;
};

void ScanProblem::reference_channel(int64_t sequence, int64_t channel, Reals& out, Reals& final_state,
                                    Gradients& grad) const {
  struct Step {
    int64_t row, at;       // at: of this channel in a row of activations
    int64_t bias_at;       // in dt_bias
    Real delta, slope, y;  // slope: d delta / d dt
    Reals before;          // state
  };
  std::vector<Step> steps;
  const int64_t first = tokens.begin(sequence), length = tokens.lengths[sequence];
  const Real* const rate = &A[channel * states];
  const int64_t state_at = (sequence * channels + channel) * states;
  Reals h(states);
  for (int64_t n = 0; initial && n < states; ++n) h[n] = initial_values[state_at + n];
  for (int64_t i = 0; i < length; ++i) {
    Step step;
    step.row = tokens.rows[reverse ? first + length - 1 - i : first + i];
    const int modality = tokens.modality(step.row);
    if (modality < 0) continue;
    step.at = step.row * channels + channel;
    step.bias_at = (bias_modalities > 1 ? modality : 0) * channels + channel;
    const Real before = dt[step.at] + (bias_modalities > 0 ? dt_bias[step.bias_at] : 0);
    step.delta = softplus ? std::log1p(std::exp(before)) : before;
    step.slope = softplus ? 1 / (1 + std::exp(-before)) : 1;
    step.before = h;
    step.y = skip ? D[channel] * u[step.at] : 0;
    for (int64_t n = 0; n < states; ++n) {
      h[n] = std::exp(step.delta * rate[n]) * h[n] + step.delta * u[step.at] * B[step.row * states + n];
      step.y += C[step.row * states + n] * h[n];
    }
    out[step.at] = gate ? step.y * z[step.at] / (1 + std::exp(-z[step.at])) : step.y;
    steps.push_back(step);
  }
  for (int64_t n = 0; n < states; ++n) final_state[state_at + n] = h[n];

  Reals g(states);  // gradient of the state after the step
  for (int64_t n = 0; grad_final && n < states; ++n) g[n] = grad_final_values[state_at + n];
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    const int64_t at = step->at, pair = step->row * states;
    Real grad_y = grad_out[at];
    if (gate) {
      const Real s = 1 / (1 + std::exp(-z[at]));
      grad.z[at] = grad_out[at] * step->y * s * (1 + z[at] * (1 - s));
      grad_y *= z[at] * s;
    }
    Real grad_delta = 0, grad_drive = 0;  // drive: delta u
    for (int64_t n = 0; n < states; ++n) {
      const Real decay = std::exp(step->delta * rate[n]);
      const Real after = decay * step->before[n] + step->delta * u[at] * B[pair + n];
      grad.C[pair + n] += grad_y * after;
      g[n] += grad_y * C[pair + n];
      grad.B[pair + n] += g[n] * step->delta * u[at];
      grad_drive += g[n] * B[pair + n];
      grad_delta += g[n] * step->before[n] * decay * rate[n];
      grad.A[channel * states + n] += g[n] * step->before[n] * decay * step->delta;
      g[n] *= decay;
    }
    grad.u[at] = grad_drive * step->delta + (skip ? D[channel] * grad_y : 0);
    grad.D[channel] += grad_y * u[at];
    grad.dt[at] = (grad_delta + grad_drive * u[at]) * step->slope;
    if (bias_modalities > 0) grad.dt_bias[step->bias_at] += grad.dt[at];
  }
  for (int64_t n = 0; n < states; ++n) grad.initial[state_at + n] = g[n];
}

Outputs ScanProblem::reference() const {
  Reals out(u.size()), final_state(state_size());
  Gradients grad{Reals(u.size()), Reals(u.size()), Reals(B.size()), Reals(B.size()),        Reals(u.size()),
                 Reals(A.size()), Reals(channels), Reals(dt_bias.size()), Reals(state_size())};
  for (int64_t s = 0; s < tokens.sequences(); ++s) {
    for (int64_t c = 0; c < channels; ++c) reference_channel(s, c, out, final_state, grad);
  }
  const ScalarType acc = acc_of(type);
  return {{"out", type, out, {}},
          {"final_state", acc, final_state, {}},
          {"grad_u", type, grad.u, {}},
          {"grad_dt", type, grad.dt, {}},
          {"grad_B", type, grad.B, {}},
          {"grad_C", type, grad.C, {}},
          {"grad_z", type, grad.z, {}},
          {"grad_A", acc, grad.A, {}},
          {"grad_D", acc, grad.D, {}},
          {"grad_dt_bias", acc, grad.dt_bias, {}},
          {"grad_initial_state", acc, grad.initial, {}}};
}

Outputs ScanProblem::run(Arena& arena, const ScanBackend& backend) const {
  const ScalarType acc = acc_of(type);
  const int64_t count = tokens.count();
  const auto rows = [&](int64_t columns) { return Matrix(arena, type, count, columns, gap, offset); };
  const auto flat = [&](int64_t size) { return Matrix(arena, acc, 1, size); };
  const auto input = [&](Matrix matrix, const Reals& values) {
    matrix.write(values);
    return matrix;
  };

  SelectiveScanParams p;
  p.type = type;
  p.channels = channels;
  p.states = states;
  p.order = tokens.place(arena);
  p.softplus = softplus;
  p.reverse = reverse;
  p.u = input(rows(channels), u).const_rows();
  p.dt = input(rows(channels), dt).const_rows();
  p.B = input(rows(states), B).const_rows();
  p.C = input(rows(states), C).const_rows();
  if (gate) p.z = input(rows(channels), z).const_rows();
  p.A = input(flat(channels * states), A).data();
  if (skip) p.D = input(flat(channels), D).data();
  if (bias_modalities > 0) p.dt_bias = input(flat(bias_modalities * channels), dt_bias).data();
  p.bias_modalities = bias_modalities;
  if (initial) p.initial_state = input(flat(state_size()), initial_values).data();

  SelectiveScanForwardParams f;
  static_cast<SelectiveScanParams&>(f) = p;
  const Matrix out = rows(channels), state = flat(state_size());
  Matrix own_state = flat(state_size());
  const Matrix checkpoints =
      flat(selective_scan_checkpoint_slots(count, tokens.sequences()) * channels * states);
  f.out = out.writable();
  if (in_place) own_state.write(initial_values), f.initial_state = own_state.data();
  if (final) f.final_state = in_place ? own_state.data() : state.data();
  f.checkpoints = checkpoints.data();
  backend.forward(f);

  SelectiveScanBackwardParams b;
  static_cast<SelectiveScanParams&>(b) = p;
  b.grad_out = input(rows(channels), grad_out).const_rows();
  if (grad_final) b.grad_final_state = input(flat(state_size()), grad_final_values).data();
  b.checkpoints = checkpoints.data();
  Outputs outputs = {output_of("out", out)};
  if (final) outputs.push_back(output_of("final_state", in_place ? own_state : state));
  std::vector<std::pair<const char*, Matrix>> gradients;
  const auto matrix = [&](const char* name, int64_t columns, bool wanted) {
    if (!wanted) return Rows{};
    return gradients.emplace_back(name, rows(columns)).second.writable();
  };
  const auto vector = [&](const char* name, int64_t size, bool wanted) -> void* {
    return wanted ? gradients.emplace_back(name, flat(size)).second.data() : nullptr;
  };
  const auto wanted = [&](int bit) { return (absent_outputs >> bit & 1) == 0; };
  b.grad_u = matrix("grad_u", channels, wanted(0));
  b.grad_dt = matrix("grad_dt", channels, wanted(1));
  b.grad_B = matrix("grad_B", states, wanted(2));
  b.grad_C = matrix("grad_C", states, wanted(3));
  b.grad_z = matrix("grad_z", channels, gate);
  b.grad_A = vector("grad_A", channels * states, wanted(4));
  b.grad_D = vector("grad_D", channels, skip);
  b.grad_dt_bias = vector("grad_dt_bias", bias_modalities * channels, bias_modalities > 0);
  b.grad_initial_state = vector("grad_initial_state", state_size(), initial && wanted(5));
  backend.backward(b);
  for (const auto& [name, gradient] : gradients) outputs.push_back(output_of(name, gradient));
  return outputs;
}

}  // namespace mixture_of_mamba::testing
