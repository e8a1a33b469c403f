// SPDX-License-Identifier: Apache-2.0
#include "scan_problem.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <utility>
#include <vector>

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
  p.growing = p.type != ScalarType::kFloat16 && random.chance(6);  // grows beyond float16
  p.garbage = p.tokens.padding && random.chance(2);
  p.fill(random);
  return p;
}

void ScanProblem::fill(Random& random) {
  tokens.assign(random);
  const ScalarType acc = acc_of(type);
  const int64_t inner = tokens.count() * channels, pairs = tokens.count() * states;
  // Without softplus delta is what it is, and has to be positive for a decay.
  const auto positive = [](Reals values) {
    for (Real& value : values) value = std::fabs(value);
    return values;
  };
  u = random.normal(inner, 0, 1, type);
  dt = random.normal(inner, softplus ? -1 : 0, softplus ? 1 : 0.3L, type);
  dt_bias = random.normal(bias_modalities * channels, softplus ? -1 : 0, softplus ? 0.5L : 0.1L, acc);
  if (!softplus) {
    dt = positive(dt);
    dt_bias = positive(dt_bias);
  }
  A = random.normal(channels * states, 0, 1, acc);
  for (size_t i = 0; i < A.size(); ++i) {
    const Real rate = -std::fabs(A[i]) * static_cast<int>(1 + i % 16);
    A[i] = static_cast<float>(growing && random.chance(2) ? -0.01L * rate : rate);
  }
  B = random.normal(pairs, 0, 1, type);
  C = random.normal(pairs, 0, 1, type);
  D = random.normal(channels, 1, 0.3L, acc);
  z = random.normal(inner, 0, 1, type);
  initial_values = random.normal(state_size(), 0, 1, acc);
  grad_out = random.normal(inner, 0, 1, type);
  grad_final_values = random.normal(state_size(), 0, 1, acc);
  for (int64_t row = 0; garbage && row < tokens.count(); ++row) {
    if (tokens.modality(row) >= 0) continue;
    for (Reals* values : {&u, &dt, &z, &grad_out}) {
      std::fill_n(values->begin() + row * channels, channels, Real(NAN));
    }
    for (Reals* values : {&B, &C}) std::fill_n(values->begin() + row * states, states, Real(NAN));
  }
}

std::string ScanProblem::describe() const {
  std::ostringstream text;
  text << name << ": " << name_of(type) << ", " << channels << " channels, " << states
       << " states, dt_bias of " << bias_modalities << (softplus ? ", softplus" : "")
       << (reverse ? ", reverse" : "") << (skip ? ", D" : "") << (gate ? ", z" : "")
       << (initial ? ", initial state" : "") << (final ? ", final state" : "")
       << (in_place ? " in place" : "") << (grad_final ? ", its gradient" : "") << ", absent outputs "
       << absent_outputs << (growing ? ", growing states" : "") << (garbage ? ", NaN in padding" : "")
       << ", gap " << gap << ", offset " << offset << ", " << tokens.describe();
  return text.str();
}

Matrix ScanProblem::rows(Arena& arena, int64_t columns) const {
  return Matrix(arena, type, tokens.count(), columns, gap, offset);
}

SelectiveScanParams ScanProblem::place(Arena& arena) const {
  const auto input = [](Matrix matrix, const Reals& values) {
    matrix.write(values);
    return matrix;
  };
  const auto flat = [&](int64_t size) { return Matrix(arena, acc_of(type), 1, size); };
  SelectiveScanParams p;
  p.type = type;
  p.channels = channels;
  p.states = states;
  p.order = tokens.place(arena);
  p.softplus = softplus;
  p.reverse = reverse;
  p.u = input(rows(arena, channels), u).const_rows();
  p.dt = input(rows(arena, channels), dt).const_rows();
  p.B = input(rows(arena, states), B).const_rows();
  p.C = input(rows(arena, states), C).const_rows();
  if (gate) p.z = input(rows(arena, channels), z).const_rows();
  p.A = input(flat(channels * states), A).data();
  if (skip) p.D = input(flat(channels), D).data();
  if (bias_modalities > 0) p.dt_bias = input(flat(bias_modalities * channels), dt_bias).data();
  p.bias_modalities = bias_modalities;
  return p;
}

Outputs ScanProblem::run_step(Arena& arena,
                              const std::function<void(const SelectiveScanForwardParams&)>& forward,
                              bool narrow_state) const {
  SelectiveScanForwardParams f;
  static_cast<SelectiveScanParams&>(f) = place(arena);
  const Matrix out = rows(arena, channels);
  Matrix state(arena, narrow_state ? type : acc_of(type), 1, state_size(), 0, offset);
  state.write(initial_values);
  f.out = out.writable();
  f.initial_state = f.final_state = state.data();
  f.narrow_state = narrow_state;
  forward(f);
  return {output_of("out", out), output_of("final_state", state)};
}

Outputs ScanProblem::run(Arena& arena, const ScanBackend& backend) const {
  const ScalarType acc = acc_of(type);
  const int64_t count = tokens.count();
  const auto rows = [&](int64_t columns) { return this->rows(arena, columns); };
  const auto flat = [&](int64_t size) { return Matrix(arena, acc, 1, size); };
  const auto input = [&](Matrix matrix, const Reals& values) {
    matrix.write(values);
    return matrix;
  };

  SelectiveScanParams p = place(arena);
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
  SelectiveScanForwardParams inference;
  static_cast<SelectiveScanParams&>(inference) = p;
  const Matrix inferred = rows(channels);
  inference.out = inferred.writable();
  backend.forward(inference);

  SelectiveScanBackwardParams b;
  static_cast<SelectiveScanParams&>(b) = p;
  b.grad_out = input(rows(channels), grad_out).const_rows();
  if (grad_final) b.grad_final_state = input(flat(state_size()), grad_final_values).data();
  b.checkpoints = checkpoints.data();
  Outputs outputs = {output_of("out", out), output_of("out", inferred)};
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
  b.out = matrix("out", channels, gate && wanted(2));
  backend.backward(b);
  for (const auto& [name, gradient] : gradients) outputs.push_back(output_of(name, gradient));
  return outputs;
}

}  // namespace mixture_of_mamba::testing
